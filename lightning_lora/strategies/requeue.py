"""SLURM's signal before the time is up, which ranks get in different places, and have to act on in the same."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.patches import Patches


class Requeue:
    """Remembers that this rank got the signal, until all ranks are where they can save together.

    Lightning saves and asks for the job again in the signal's handler, wherever a rank is. A save is a collective:
    ranks that are in different places of a step would wait for each other.

    Args:
        trainer: A Trainer whose ranks SLURM started.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._asked, self._done = trainer, False, False

    def note(self, handle: Callable[..., None], *args: Any) -> None:
        """In the place of Lightning's handler."""
        self._asked = True

    def act(self, handle: Callable[..., None]) -> None:
        """Lets Lightning's handler do its work on every rank, if any rank got the signal. A collective.

        Once in a run: some ranks get the signal before they act for the others, and some behind that.
        """
        strategy = self._trainer.strategy
        if not self._done and strategy.reduce_boolean_decision(self._asked, all=False):
            self._done = True
            handle(strategy.cluster_environment.requeue_signal, None)

    def act_between_steps(self, handle: Callable[..., None]) -> None:
        """The same, unless gradients wait for their step, or the epoch's last batch for its validation.

        No file has such gradients. And what Lightning saves between the last batch and the end of an epoch ends a run
        that goes on from it at once, if the loader saves its state (2.6, with or without adapters).
        """
        loop = self._trainer.fit_loop
        if not (loop._should_accumulate() or loop.epoch_loop.batch_progress.is_last_batch):
            self.act(handle)


def agree_on_requeue(trainer: Any, model: nn.Module, patches: Patches) -> None:
    """Lets the ranks of a SLURM job save behind a batch, or at the end of an epoch, all in the same place.

    Args:
        trainer: The Trainer, before it registers its handlers.
        model: The LightningModule, whose hooks come behind those of all callbacks.
        patches: What is taken off again when the run ends.
    """
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    is_slurm = any(cls.__name__ == "SLURMEnvironment" for cls in type(environment).__mro__)
    if not (is_slurm and environment.auto_requeue and trainer.world_size > 1 and trainer.state.fn == "fit"):
        return
    requeue, connector = Requeue(trainer), trainer._signal_connector
    handle = connector._slurm_sigusr_handler_fn
    patches.wrap(connector, "_slurm_sigusr_handler_fn", requeue.note)
    patches.call_after(model, "on_train_batch_end", functools.partial(requeue.act_between_steps, handle))
    patches.call_after(model, "on_train_epoch_end", functools.partial(requeue.act, handle))
