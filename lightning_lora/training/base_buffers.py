"""Buffers of a frozen base that some layers change in train mode all the same."""

from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.marks import is_whole
from lightning_lora.state import modules_beside_the_base, persistent_buffers

PACKED = 1 << 20  # bytes


class BaseBuffers:
    """Remembers the persistent buffers of a frozen base, and puts them back where a training step changed them.

    Running statistics are locked (`lightning_lora.layers.lock_statistics`); this is for what can't be known by type: a
    codebook with moving averages, an observer, a counter. They are in no adapter checkpoint, so that without this
    the saved adapter would not be the one that was validated. Large integer buffers are packed weights of quantised
    layers, which training does not change, and are not copied.

    Args:
        model: The model; a LightningModule's own buffers, and those of modules trained in full, are not touched.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {id(module) for _, module in modules_beside_the_base(model)}
        self._told: set[str] = set()
        self._kept: list[tuple[nn.Module, str, Tensor, int, Tensor]] = []
        for module in model.modules():
            if id(module) not in own and not isinstance(module, Adapter) and not is_whole(module):
                for key, buffer in persistent_buffers(module):
                    if not buffer.is_floating_point() and buffer.nbytes > PACKED:
                        continue
                    self._kept.append((module, key, buffer, buffer._version, buffer.detach().clone()))

    def restore(self) -> list[str]:
        """Puts changed buffers back; returns the names (class and key) of those that never changed before."""
        changed = set()
        for i, (module, key, buffer, version, value) in enumerate(self._kept):
            if getattr(module, key, None) is not buffer or buffer._version != version:
                changed.add(f"{type(module).__name__}.{key}")
                buffer.copy_(value)
                setattr(module, key, buffer)
                self._kept[i] = (module, key, buffer, buffer._version, value)
        new = sorted(changed - self._told)
        self._told |= changed
        return new
