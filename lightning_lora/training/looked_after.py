"""What is looked after while a run trains."""

from collections.abc import Callable, Collection

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listing
from lightning_lora.training.attached import Attached
from lightning_lora.training.base_buffers import BaseBuffers
from lightning_lora.training.base_weights import BaseWeights
from lightning_lora.training.health import Watch


class Training:
    """The trained tensors, in the first steps; the weights and the buffers of the frozen base, in all of them.

    Args:
        model: The model, as training begins.
        optimizers: Its optimizers.
        adapter_names: The adapters that the run trains.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], adapter_names: Collection[str]) -> None:
        self._watch: Watch | None = Watch(model, optimizers, adapter_names)
        self._base = BaseWeights(model, optimizers, adapter_names)
        self._buffers = BaseBuffers(model)
        self._attached = [Attached(model, optimizer) for optimizer in optimizers if isinstance(optimizer, Optimizer)]
        self.check_base: Callable[[], None] = self._base.check_values

    def begin_batch(self) -> None:
        """A training batch begins."""
        self._base.check_optimizers()
        if self._watch is not None:
            self._watch.training = True

    def end_batch(self) -> None:
        """A training batch ends. Undoes what layers of the frozen base did to their buffers."""
        if changed := self._buffers.restore():
            rank_zero_info(f"Buffers of the frozen base change in training and are put back: {listing(changed)}")
        if self._watch is not None:
            self._watch.training = False
            if self._watch.done:
                self._stop_watching()

    def end(self) -> None:
        """Training ends. Warns about what never moved, and about what moved and should not."""
        if self._watch is not None:
            self._watch.close(finished=True)
        if (problem := self._base.changed()) is not None:
            rank_zero_warn(problem)

    def close(self) -> None:
        """Takes all hooks off."""
        self._stop_watching()
        for attached in self._attached:
            attached.remove()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None
