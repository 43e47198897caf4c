"""Going on with the random numbers of a checkpoint, from where the run that wrote it went on."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.formats.rng import own_rng, restore_rng


class RandomStates:
    """Restores random states as often as Lightning draws from them on its way back into a run.

    A checkpoint has the states as they were when it was saved. Before the run goes on from there, Lightning makes
    iterators, which draw: one for the epoch that goes on (or for the next one, if the saved one was complete), and
    another one where an epoch's last batch, but not its end, was reached.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def resume(self, states: list[dict[str, Any]], trainer: Any) -> None:
        """The checkpoint was loaded; no iterator was made."""
        self._state = own_rng(states, trainer.global_rank, trainer.world_size)
        if self._state is None:
            rank_zero_info("The checkpoint is from another number of processes: random states are not restored")
        else:
            restore_rng(self._state)

    def on_train_start(self, trainer: Any) -> None:
        """The iterator for the rest of an epoch was made, and drew: its batches go on from what was saved."""
        loop = trainer.fit_loop
        if self._state is not None and loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch:
            restore_rng(self._state)
            self._state = None

    def on_train_epoch_start(self, trainer: Any) -> None:
        """If another iterator is going to be made for this first new epoch, it draws from what was saved."""
        loop = trainer.fit_loop
        if self._state is not None and trainer.current_epoch > 0:
            if not loop.is_resuming and not loop.epoch_loop.restarting:
                restore_rng(self._state)
        self._state = None
