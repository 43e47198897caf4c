"""Methods that a model has on the instance, in place of its class's, while it has adapters."""

import weakref
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
    packages: ClassVar[tuple[str, ...]] = ()
    """Whose method it is in place of; that of anybody if there are none. One of a user's own may know of adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model: Any = self._model()
        return type(self)(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return type(self), (self._model(),)

    @classmethod
    def is_for(cls, module: nn.Module) -> bool:
        """Whether the class of a module has such a method."""
        own = getattr(type(module), cls.name, None)
        whose = (getattr(own, "__module__", None) or "").partition(".")[0]
        return own is not None and (not cls.packages or whose in cls.packages)

    @classmethod
    def keep(cls, module: nn.Module, wanted: bool) -> None:
        """Puts it on a module, or takes it off."""
        if wanted:
            vars(module).setdefault(cls.name, cls(module))
        elif isinstance(vars(module).get(cls.name), cls):
            del vars(module)[cls.name]


class Saving(Instead):
    """``save_pretrained``, which would write adapters where nothing reads them: the folder loads as the base."""

    name = "save_pretrained"
    packages = ("transformers", "diffusers", "huggingface_hub")

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


class Adding(Instead):
    """transformers' ``add_adapter``: PEFT's layers would hide those that have adapters, and freeze these."""

    name = "add_adapter"
    packages = ("transformers", "diffusers")
    ours: ClassVar[str] = "ll.inject"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError."""
        raise ConfigError(
            f"{self.name}: the model has adapters of lightning_lora, and PEFT would freeze them. {self.ours} gives it "
            "another one beside them; ll.eject or ll.merge_and_unload takes them off"
        )


class Loading(Adding):
    """transformers' ``load_adapter``, likewise."""

    name = "load_adapter"
    ours = "ll.load_adapter"


def keep_apart(module: nn.Module) -> None:
    """Sees to methods of a module that know nothing of its adapters, while it has some."""
    if kinds := [kind for kind in (Saving, Adding, Loading) if kind.is_for(module)]:
        wanted = any(True for _ in lora_layers(module))
        for kind in kinds:
            kind.keep(module, wanted)
