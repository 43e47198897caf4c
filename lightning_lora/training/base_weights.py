"""The weights of a frozen base, which are in no checkpoint of adapters and so must not change."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import CheckpointError, DeadAdapterError, listing
from lightning_lora.formats.fingerprint import changed, fingerprint
from lightning_lora.names import clean
from lightning_lora.ops.sharded import is_spread
from lightning_lora.state import trained_parameters
from lightning_lora.strategies.zero import is_partitioned

_WAY_OUT = "It would be in no checkpoint: name it in modules_to_save, so that it is trained and saved in full"


class BaseWeights:
    """Notices when something trains the base after all: another callback, or code of the user's own.

    Args:
        model: The model, as training begins.
        optimizers: Its optimizers.
        adapter_names: The adapters that the run trains.
        described: The fingerprint that was taken when the model was complete, and that checkpoints are going to have.

    Raises:
        CheckpointError: If the base got other weights since. Where a rank has a part of it only, that can't be seen.
    """

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], adapter_names: Iterable[str], described: dict[str, Any]
    ) -> None:
        self._model, self.optimizers = model, optimizers
        self._trained = {id(parameter) for _, parameter in trained_parameters(model, adapter_names)}
        self._first: dict[str, Any] = fingerprint(model, local=True)
        in_parts = is_spread(model) or any(map(is_partitioned, model.parameters()))
        if not in_parts and (names := changed(described, self._first)):
            raise CheckpointError(
                f"the frozen base changed after configure_model: {listing(names, 4)}. Checkpoints describe the base as "
                "it was then, and a run that goes on from one would refuse this base: load its weights in __init__, "
                "setup or configure_model"
            )
        if names := changed(described, self._first, buffers=True):
            rank_zero_warn(
                f"buffers of the frozen base were filled after configure_model: {listing(names, 4)}. No file has "
                "them: fill them in __init__, setup or configure_model, or keep them in the LightningModule itself, "
                "whose buffers are saved"
            )
        self._held = 0

    def check_optimizers(self) -> None:
        """To be called before each batch: looks only if the optimizers got something.

        Raises:
            DeadAdapterError: If they got weights of the base, as BackboneFinetuning gives them.
        """
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        if (held := sum(map(len, groups))) != self._held:
            self._held = held
            foreign = {id(p) for group in groups for p in group} - self._trained
            if names := [clean(name) for name, p in self._model.named_parameters() if id(p) in foreign]:
                raise DeadAdapterError(f"an optimizer got weights of the frozen base: {listing(names, 4)}. {_WAY_OUT}")

    def changed(self) -> str | None:
        """What to say if the base is not what it was: a few sampled values of each weight are compared."""
        names = changed(self._first, fingerprint(self._model, local=True))
        return f"weights of the frozen base changed in training: {listing(names, 4)}. {_WAY_OUT}" if names else None

    def check_values(self) -> None:
        """To be called before a checkpoint is written.

        Raises:
            CheckpointError: If the base is not what it was.
        """
        if (problem := self.changed()) is not None:
            raise CheckpointError(problem)
