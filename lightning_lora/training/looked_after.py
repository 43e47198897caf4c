"""What is looked after while a run trains."""

import warnings
from collections.abc import Callable, Collection
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import DeadAdapterError, listing
from lightning_lora.layers import lora_layers
from lightning_lora.methods.active import active_adapters
from lightning_lora.names import clean
from lightning_lora.ops.finite import is_finite
from lightning_lora.ops.sharded import of_any_rank, own_part
from lightning_lora.optim import RATIO, require_trained, without_ratio
from lightning_lora.state import trained_parameters
from lightning_lora.training.attached import Attached, tells_steps
from lightning_lora.training.base_weights import BaseWeights
from lightning_lora.training.health import check_again
from lightning_lora.training.second_look import BATCHES, SecondLook
from lightning_lora.training.steps import Steps
from lightning_lora.training.watch import DIVERGED, Watch
from lightning_lora.training.ways_out import PATIENCE


class Training:
    """The trained tensors, in the first steps and now and then later; steps and the frozen base, in all of them.

    Args:
        model: The model, as training begins.
        optimizers: Its optimizers.
        adapter_names: The adapters that the run trains.
        listed: The Trainer's own list of them.
        described: The fingerprint of the base that checkpoints are going to have.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        adapter_names: Collection[str],
        listed: list[Any],
        described: dict[str, Any],
    ) -> None:
        self._model, self._names, self._listed = model, adapter_names, listed
        self._base = BaseWeights(model, optimizers, adapter_names, described)
        self._watches: list[Watch] = []  # the one of the first steps, while anything waits, and a second look
        self._unmoved = set[int]()  # ids of biases that were told not to move
        self._looked = 0  # the step at which it was looked at them, or that training began with
        self._due, self._rest, self._thawed = False, set[str](), set[str]()
        self._resting = _inactive(model, adapter_names)  # and in no step yet active
        self._began: int | None = None
        self._began_with = [name for name, _ in trained_parameters(model, adapter_names)]
        self._attached: list[Attached] = []
        self._steps: Steps | None = None
        self.check_base: Callable[[], None] = self._base.check_values
        self._follow(optimizers)

    def _follow(self, optimizers: list[Optimizer]) -> None:
        self.close()
        for silent in (each for each in optimizers if not tells_steps(each)):
            warnings.warn(
                f"{type(silent).__name__} never called Optimizer.__init__, and tells nobody when it steps: whether "
                "what it holds is trained is not watched in this run",
                stacklevel=2,
            )
        self._watches = [Watch(self._model, optimizers, self._names, unmoved=self._unmoved)]
        self._attached = [Attached(self._model, each) for each in optimizers if isinstance(each, Optimizer)]
        self._steps = Steps(dict(trained_parameters(self._model, self._names)), optimizers)
        self._base.optimizers = optimizers

    def begin_batch(self, listed: list[Any], optimizers: Callable[[], list[Optimizer]], step: int) -> None:
        """A training batch begins. Turns to other optimizers if the Trainer has got new ones.

        Args:
            listed: The Trainer's list of optimizers.
            optimizers: What gives these as they hold parameters of the model.
            step: How many steps they have made.

        Raises:
            DeadAdapterError: If something that is to be trained is in none of the new ones, or an adapter was never
                active.
        """
        if listed is not self._listed:
            self._listed, new = listed, optimizers()
            require_trained(self._model, new)
            self._follow(new)
        if 0 < step < 3 and (alike := without_ratio(listed)):  # later a schedule may have led both to the same
            rank_zero_warn(
                f"loraplus_lr_ratio has no effect: something gave all groups of the optimizer one learning rate "
                f"({alike[0]['lr']:g}). Where you set group['lr'], multiply it by group.get({RATIO!r}, 1)"
            )
        if self._began is None:  # what hooks did as training began
            self._began = self._looked = step
            self._check_again(optimizers())
        self._base.check_optimizers()
        if self._due and step - self._looked >= min(max(self._looked, 1), PATIENCE):
            self._look_again(optimizers(), step)
        if self._resting:
            self._look_at_resting(step - self._began)
        for watch in self._watches:
            watch.training = True

    def look_again(self) -> None:
        """An epoch began, or a validation ended: what is done there may leave a model that does not train.

        Looked at by the next batch, unless it was not long ago.
        """
        self._due = True

    def _check_again(self, optimizers: list[Optimizer]) -> dict[str, nn.Parameter]:
        trained = dict(trained_parameters(self._model, self._names))
        check_again(self._model, optimizers, trained, self._began_with)
        return trained

    def _look_again(self, optimizers: list[Optimizer], step: int) -> None:
        self._due, self._looked = False, step
        self._look_at_flags(self._check_again(optimizers))
        if not any(isinstance(watch, SecondLook) for watch in self._watches):
            waiting = [*self._unmoved, *(key for watch in self._watches for key in watch.waiting)]
            self._watches.append(SecondLook(self._model, optimizers, self._names, without=waiting))

    def _look_at_flags(self, trained: dict[str, nn.Parameter]) -> None:
        active = {key for key, _ in trained_parameters(self._model, active_adapters(self._model))}
        rest = {name for name, p in trained.items() if name in active and not p.requires_grad}
        known = {id(p) for _, p in trained_parameters(self._model)}
        thawed = {clean(n) for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in known}
        if new := rest - self._rest:
            rank_zero_warn(
                f"requires_grad was turned off in the run on {listing(sorted(new), 4)}: they are not trained any more"
            )
        if new := thawed - self._thawed:
            rank_zero_warn(
                f"requires_grad was turned on in the run on {listing(sorted(new), 4)}: no optimizer has them, so that "
                "they cost memory and do not change. What is to be trained in full is named in modules_to_save"
            )
        self._rest, self._thawed = rest, thawed

    def _look_at_resting(self, steps: int) -> None:
        if steps == BATCHES:
            rank_zero_warn(_never_active(self._resting, steps))
        if steps >= PATIENCE:
            raise DeadAdapterError(_never_active(self._resting, steps))

    def after_backward(self) -> None:
        """Gradients have come: to adapters that are active now, or that samples of a batch had (`mixed_batch`)."""
        if self._resting:
            self._resting = [
                name
                for name in _inactive(self._model, self._resting)
                if all(p.grad is None for _, p in trained_parameters(self._model, [name]))
            ]

    def end_batch(self) -> None:
        """A training batch ends."""
        for watch in self._watches:
            watch.training = False
            if watch.done:
                watch.close()
        self._watches = [watch for watch in self._watches if not watch.done]
        if self._steps is not None:
            self._steps.end_batch()

    def end(self, stopped: bool) -> None:
        """Training ends. Warns about what never moved, and about what moved and should not. A collective.

        Args:
            stopped: Whether something stopped the run before its end (EarlyStopping): it may have seen the divergence.

        Raises:
            DeadAdapterError: If what was trained is not finite.
        """
        for watch in self._watches:
            watch.close(finished=True)
        if self._steps is not None:
            self._steps.close(finished=True)
        if self._resting:
            rank_zero_warn(_never_active(self._resting))
        if (problem := self._base.changed()) is not None:
            rank_zero_warn(problem)
        odd = [name for name, p in trained_parameters(self._model, self._names) if not is_finite(own_part(p))]
        if found := of_any_rank(odd):
            if not stopped:
                raise DeadAdapterError(f"{listing(found, 4)}: {DIVERGED}")
            rank_zero_warn(f"{listing(found, 4)}: {DIVERGED}")

    def close(self) -> None:
        """Takes all hooks off."""
        for watch in self._watches:
            watch.close()
        self._watches = []
        if self._steps is not None:
            self._steps.close()
        for attached in self._attached:
            attached.remove()
        self._attached = []


def _inactive(model: nn.Module, adapter_names: Collection[str]) -> list[str]:
    """Which of some adapters are not active: a checkpoint was written then, or a sanity check left others so."""
    active, held = active_adapters(model), {name for _, layer in lora_layers(model) for name in layer.lora}
    return [name for name in adapter_names if name in held and name not in active]


def _never_active(adapter_names: list[str], steps: int | None = None) -> str:
    when = "this run" if steps is None else f"the first {steps} steps of this run"
    return (
        f"adapters that this run is to train were not active in {when}, and got no gradient: {listing(adapter_names)}. "
        "A resumed run has those active that were when its checkpoint was written: call ll.set_adapter(model, [...]) "
        "in on_train_start with all that are to be trained"
    )
