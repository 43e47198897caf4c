"""Buffers of a frozen base that some layers change in train mode all the same."""

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_lora.errors import listing
from lightning_lora.injection.copies import may_change
from lightning_lora.state import base_buffers


class BaseBuffers:
    """Remembers the persistent buffers of a frozen base, and puts them back where a training step changed them.

    Running statistics are locked (`lightning_lora.layers.lock_statistics`); this is for what can't be known by type: a
    codebook with moving averages, an observer, a counter. They are in no adapter checkpoint, so that without this
    the saved adapter would not be the one that was validated. Packed weights are not copied.

    Args:
        model: The model; a LightningModule's own buffers, and those of modules trained in full, are not touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._told: set[str] = set()
        self._kept: list[tuple[nn.Module, str, Tensor, int, Tensor]] | None = None

    def keep(self) -> None:
        """A training step begins: the first one finds the values that are kept."""
        if self._kept is None:
            self._kept = []
            for _, module, key, buffer in base_buffers(self._model):
                if may_change(buffer):
                    self._kept.append((module, key, buffer, buffer._version, buffer.detach().clone()))

    def put_back(self) -> None:
        """A training step, or the run, ends. Says which buffers (class and key) never changed before."""
        changed = set()
        for i, (module, key, buffer, version, value) in enumerate(kept := self._kept or []):
            if getattr(module, key, None) is not buffer or buffer._version != version:
                changed.add(f"{type(module).__name__}.{key}")
                buffer.copy_(value)
                setattr(module, key, buffer)
                kept[i] = (module, key, buffer, buffer._version, value)
        if new := sorted(changed - self._told):
            rank_zero_info(f"Buffers of the frozen base change in training and are put back: {listing(new)}")
        self._told |= changed
