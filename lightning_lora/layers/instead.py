"""Methods that a model has on the instance, in place of its class's, while it has adapters."""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn

from lightning_lora.errors import ConfigError, listing
from lightning_lora.layers.find import lora_layers
from lightning_lora.marks import MERGED


class Instead:
    """A method of a model. It does not hold the model, and that of a copy is the copy's.

    Args:
        model: The model, which has it as an attribute.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model: Any = self._model()
        return type(self)(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return type(self), (self._model(),)

    @classmethod
    def keep(cls, module: nn.Module, wanted: Callable[[], bool]) -> None:
        """Puts it on a module whose class has such a method, or takes it off."""
        if not hasattr(type(module), cls.name):
            return
        if wanted():
            vars(module).setdefault(cls.name, cls(module))
        elif isinstance(vars(module).get(cls.name), cls):
            del vars(module)[cls.name]


class Saving(Instead):
    """``save_pretrained``, which would write adapters where nothing reads them: the folder loads as the base."""

    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does what the model's own method does, where adapters are merged.

        Raises:
            ConfigError: If they are not.
        """
        model: Any = self._model()
        if apart := [name for name, layer in lora_layers(model) if MERGED not in vars(layer)]:
            raise ConfigError(
                f"{self.name}: {listing(apart, 3)} have adapters, and who loads the folder would get the base without "
                "them. ll.save_adapter(model, folder) writes what PEFT loads; ll.merge_and_unload(model) makes a model "
                "that can be saved so, and ll.eject(model) gives the base"
            )
        return getattr(type(model), self.name)(model, *args, **kwargs)


def keep_saving(module: nn.Module) -> None:
    """Sees to what a module is saved by, while it has adapters."""
    Saving.keep(module, lambda: any(True for _ in lora_layers(module)))
