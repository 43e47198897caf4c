"""Averages of what a run trains, over its steps."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.checks import is_number, is_positive_int
from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.lightning_packages import CallbackBase
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import is_plain
from lightning_lora.optim import trained_in_run
from lightning_lora.patches import Patches

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


_ROUNDING = 1e-9  # of a part of a run


class AdapterAveraging(CallbackBase):
    r"""Averages adapters, and what is trained in full with them, over the steps of a run; their base has one value.

    .. math:: \bar\theta_n = d\,\bar\theta_{n-1} + (1 - d)\,\theta_n, \quad \bar\theta_1 = \theta_1
        \qquad\text{or}\qquad \bar\theta_n = \frac{1}{n} \sum_{i=1}^{n} \theta_i

    The first one is an exponential moving average (EMA), the second stochastic weight averaging (SWA,
    arXiv:1803.05407, eq. in section 3.2; for its schedule of learning rates see the optimizer's). A, B and magnitudes
    are averaged each by itself, in float32 at least: the mean of B times the mean of A is not the mean of B A, and as
    near to it as steps are to each other.

    Validation measures the average, checkpoints and PEFT folders hold it, and the model has it when the fit ends; the
    values that are trained on lie in the checkpoint too, and a run that is resumed goes on with both. It takes one copy
    of what is trained. Lightning's EMAWeightAveraging keeps a copy of the whole model instead, so that a base must not
    be packed. Put it behind `LoRA`. Parameters of which ranks hold parts are refused.

    Args:
        decay: d of the EMA; None for the mean of all.
        every_n_steps: How often the values are taken, in optimizer steps.
        start: The part of the run, in [0, 1), after which averaging begins: of its steps or of its batches, whichever
            limit ends the run.

    Raises:
        ConfigError: With everything that is wrong with the arguments; when training begins, if there is a start and the
            length of the run is not known.
        UnsupportedError: When training begins, if parameters are in pieces.
        CheckpointError: If a checkpoint has averages of something else.

    Example:
        >>> AdapterAveraging(decay=None, start=0.75).every_n_steps
        1
    """

    def __init__(self, decay: float | None = 0.999, every_n_steps: int = 1, start: float = 0.0) -> None:
        raise_all(ConfigError, _problems(decay, every_n_steps, start), "AdapterAveraging")
        self.decay, self.every_n_steps, self.start = decay, every_n_steps, start
        self._patches = Patches()
        self._restored: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self._own: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] | None = None  # while the model has the average, what it is trained on
        self._count, self._step = 0, 0
        self._training = False

    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Called when fit, validate, test or predict begins. From now on checkpoints get the average."""
        self._patches.release()
        if stage == "fit":
            self._begin()
            self._restored = None
            self._patches.wrap(trainer, "save_checkpoint", self._save)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training begins. Goes on with the averages of a checkpoint, if it has some."""
        self._own = trained_in_run(pl_module, trainer.optimizers)
        if pieces := [name for name, p in self._own.items() if not is_plain(p)]:
            raise UnsupportedError(
                f"AdapterAveraging: {listing(pieces, 3)} are in pieces, of which each rank has one: leave it out, or "
                "train under DDP"
            )
        if self.start and _gone_by(trainer) is None:
            raise ConfigError(
                "AdapterAveraging: start is a part of the run, and how long that is can't be known: give the Trainer "
                "max_steps, or max_epochs with data that have a length"
            )
        self._step = trainer.global_step
        self._training = True
        self._go_on()

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends. Takes the values in, if there was a step."""
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps == before // self.every_n_steps:
            return
        if self.start and (_gone_by(trainer) or 0.0) <= self.start + _ROUNDING:
            return
        self._count += 1
        with torch.no_grad():
            for name, p in self._own.items():
                if self._count == 1:
                    self._average[name] = p.detach().to(accumulation_dtype(p), copy=True)
                else:
                    share = 1 / self._count if self.decay is None else 1 - self.decay
                    self._average[name].lerp_(p.detach().to(self._average[name].dtype), share)

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when validation begins. Puts the average in."""
        if trainer.state.fn == "fit":
            self._enter()

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when validation ends. Training goes on from where it was."""
        if trainer.state.fn == "fit":
            self._leave()

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training ends. The model keeps the average."""
        if not self._count:
            rank_zero_warn(
                f"AdapterAveraging: nothing was averaged in {trainer.global_step} steps, with start={self.start} and "
                f"every_n_steps={self.every_n_steps}: the model has the values of the last one"
            )
        self._enter()
        self._training = False

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Called when a run is broken off. Checkpoints that are saved now get the average too."""
        self._leave()
        self._training = False

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Called when fit, validate, test or predict ends."""
        self._patches.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called when a checkpoint is saved, which has the average where values are looked for."""
        if self._trained is None:
            return {"count": 0}
        rounded = {name: value for name, value in self._average.items() if value.dtype != self._own[name].dtype}
        return {"count": self._count, "trained": self._trained, "average": rounded}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded; by Lightning's finders in the midst of a run too."""
        self._restored = state_dict
        if self._training:
            self._go_on()

    def _go_on(self) -> None:
        """Goes on from a checkpoint, whose averages are in the model."""
        state, self._restored = self._restored, None
        if state is None or not state["count"]:
            return
        if state["trained"].keys() != self._own.keys():
            names = sorted(state["trained"].keys() ^ self._own.keys())
            raise CheckpointError(f"AdapterAveraging: the checkpoint has other averages: {listing(names, 3)}")
        self._count = state["count"]
        self._average = {name: p.detach().to(accumulation_dtype(p), copy=True) for name, p in self._own.items()}
        self._average |= {name: value.to(self._own[name].device) for name, value in state["average"].items()}
        self._trained = state["trained"]
        self._leave()

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.averaged():
            return original(*args, **kwargs)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the average, and the values that it had before there was one.

        It makes a mean teacher of the student itself (arXiv:1703.01780, section 2): no second model, whose base would
        be the same. Ask the teacher before the student, as a backward pass needs the values of its forward pass:

        .. code-block:: python

            with self.averaging.averaged(), torch.no_grad():
                wanted = self.net(weak)
            loss = F.mse_loss(self.net(strong), wanted)
        """
        is_there = self._trained is not None
        self._enter()
        try:
            yield
        finally:
            if not is_there:
                self._leave()

    @torch.no_grad()
    def _enter(self) -> None:
        if self._count and self._trained is None:
            self._trained = {name: p.detach().clone() for name, p in self._own.items()}
            for name, p in self._own.items():
                p.copy_(self._average[name])

    @torch.no_grad()
    def _leave(self) -> None:
        if self._trained is not None:
            for name, p in self._own.items():
                p.copy_(self._trained[name])
            self._trained = None


def _gone_by(trainer: "Trainer") -> float | None:
    """Which part of a fit's steps or batches has gone by, of what ends it first; None where no end is known."""
    parts = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if epochs > 0 and math.isfinite(batches):
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready / max(batches, 1)
        parts.append((trainer.current_epoch + done) / epochs)
    return max(parts, default=None)


def _problems(decay: Any, every_n_steps: Any, start: Any) -> Iterator[str]:
    if decay is not None and (not is_number(decay) or not 0 <= decay < 1):
        yield f"decay must be in [0, 1), or None for the mean of all, got {decay!r}"
    if not is_positive_int(every_n_steps):
        yield f"every_n_steps must be a positive integer, got {every_n_steps!r}"
    if not is_number(start) or not 0 <= start < 1:
        yield f"start must be in [0, 1), a part of all steps, got {start!r}"
