"""Going on from a checkpoint as the run that wrote it went on: with its random numbers, in the epoch that was due."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.errors import counted
from lightning_lora.formats.rng import own_rng, restore_rng


class RandomStates:
    """Restores random states as often as Lightning draws from them on its way back into a run.

    A checkpoint has the states as they were when it was saved. Before the run goes on from there, Lightning makes
    iterators, which draw: one before it says in which epoch that is, and another one when the next epoch begins.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def resume(self, states: list[dict[str, Any]], trainer: Any) -> None:
        """The checkpoint was loaded; no iterator was made."""
        self._state = own_rng(states, trainer.global_rank, trainer.world_size)
        if self._state is None:
            rank_zero_info(
                f"Random states are not restored: the checkpoint has those of {counted(len(states), 'rank')}, and "
                f"this run has {trainer.world_size}. (That of a run that broke off has those of rank 0.)"
            )
        else:
            restore_rng(self._state)

    def on_train_start(self, trainer: Any) -> None:
        """The iterator for the rest of an epoch was made, and drew: its batches go on from what was saved."""
        loop = trainer.fit_loop
        if is_behind := is_behind_an_epoch(loop):
            finish_epoch(loop)
        epoch = trainer.current_epoch - is_behind  # the last one that was begun
        remakes = reload_as_due(loop, trainer, epoch)  # the loader of the next one, before that is said to begin
        is_within = loop.restarted_mid_epoch and not is_behind
        is_over = is_behind or (is_within and loop.epoch_loop.batch_progress.is_last_batch)
        if self._state is not None and (remakes if is_over else is_within):
            restore_rng(self._state)
            self._state = None

    def on_train_epoch_start(self, trainer: Any) -> None:
        """If another iterator is going to be made for this first new epoch, it draws from what was saved."""
        loop = trainer.fit_loop
        if self._state is not None and trainer.current_epoch > 0:
            if not loop.is_resuming and not loop.epoch_loop.restarting:
                restore_rng(self._state)
        self._state = None


def reload_as_due(loop: Any, trainer: Any, epoch: int) -> bool:
    """Lets loaders be made anew in the epochs in which ``reload_dataloaders_every_n_epochs`` would have done so.

    Lightning counts from the epoch in which a run is resumed.

    Returns:
        Whether that of the next epoch is.
    """
    if not (every := trainer.reload_dataloaders_every_n_epochs):
        return False
    loop._last_train_dl_reload_epoch = epoch - epoch % every
    return bool((epoch + 1) % every == 0)


def is_behind_an_epoch(loop: Any) -> bool:
    """Whether a run was resumed from a file that was saved behind the last batch of an epoch, or at its end.

    Also behind a fit that ended with it: a run of so many steps would take that epoch for one that goes on. One that
    was saved by the validation in between is none of these: Lightning itself goes on to that epoch's end.
    """
    batches = loop.epoch_loop
    is_last = loop.restarted_mid_epoch and batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch
    epochs = loop.epoch_progress.current
    is_over = loop.restarting and epochs.ready == epochs.completed and batches.batch_progress.is_last_batch
    return bool(is_last or is_over or loop.restarted_on_epoch_end or loop.resumed_on_epoch_end)


def finish_epoch(loop: Any) -> None:
    """Lets the next epoch begin as any other one, with its own iterator.

    Lightning (2.6) would go on as if it were within that epoch. The iterator that it made ahead is one of no epoch in
    particular, or at its end if it comes from a loader that saves its state, so that an epoch would have no batches.
    And an epoch that isn't counted as begun is trained on twice when this run is resumed in its turn; or, with
    ``max_steps``, the one that was over ends twice.
    """
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
    loop.epoch_loop.reset()  # counts the last batch
    loop.epoch_loop.restarting = False
    loop.epoch_loop.on_iteration_done()
    loop.on_iteration_done()
