"""One callback for both Lightning packages, ``lightning.pytorch`` and ``pytorch_lightning``.

Their Callback classes are unrelated, and a LightningCLI takes only its own package's. A class that derives from both
works in both.
"""

from typing import TYPE_CHECKING

from lightning_utilities.core import rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import Callback as CallbackBase
else:
    import lightning.pytorch

    # Each package directs rank-zero messages to its own logger when it is imported: the first one shall keep them.
    _settings = rank_zero.log, rank_zero.rank_zero_deprecation_category
    import pytorch_lightning

    rank_zero.log, rank_zero.rank_zero_deprecation_category = _settings

    class CallbackBase(lightning.pytorch.Callback, pytorch_lightning.Callback):
        """A callback of both packages."""


__all__ = ["CallbackBase"]
