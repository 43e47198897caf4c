"""Ranks of a SLURM job agree on when they save before it is requeued."""

from types import SimpleNamespace

import pytest
import torch

from lightning_lora.patches import Patches
from lightning_lora.strategies.requeue import agree_on_requeue


class SLURMEnvironment:
    requeue_signal = "USR1"

    def __init__(self, auto_requeue=True):
        self.auto_requeue = auto_requeue


def slurm_trainer(others=False, accumulates=False, is_last=False, world_size=2, fn="fit", environment=None):
    """What this package asks of a Trainer; ``others`` says whether another rank has the signal."""
    batches = SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=is_last))
    handled = []
    return SimpleNamespace(
        strategy=SimpleNamespace(
            cluster_environment=environment or SLURMEnvironment(),
            reduce_boolean_decision=lambda own, all: own or others,
        ),
        fit_loop=SimpleNamespace(_should_accumulate=lambda: accumulates, epoch_loop=batches),
        world_size=world_size,
        state=SimpleNamespace(fn=fn),
        _signal_connector=SimpleNamespace(_slurm_sigusr_handler_fn=lambda *args: handled.append(args)),
        handled=handled,
    )


class Hooks(torch.nn.Module):
    def on_train_batch_end(self):
        pass

    def on_train_epoch_end(self):
        pass


@pytest.mark.parametrize("others", [False, True])
def test_ranks_save_once_behind_the_batch_in_which_any_of_them_got_the_signal(others):
    trainer, model, patches = slurm_trainer(others), Hooks(), Patches()
    agree_on_requeue(trainer, model, patches)
    if not others:
        model.on_train_batch_end()
        assert trainer.handled == []
        trainer._signal_connector._slurm_sigusr_handler_fn("USR1", None)
        assert trainer.handled == []  # not within a step
    for _ in range(2):  # of which some ranks get the signal only behind the save
        model.on_train_batch_end()
        trainer._signal_connector._slurm_sigusr_handler_fn("USR1", None)
        model.on_train_epoch_end()
        assert trainer.handled == [("USR1", None)]
    patches.release()
    assert not vars(model).keys() & {"on_train_batch_end", "on_train_epoch_end"}


@pytest.mark.parametrize("where", ["accumulates", "is_last"])
def test_nothing_is_saved_where_a_run_could_not_go_on(where):
    """Gradients that wait for their step are in no file; behind an epoch's last batch comes its end."""
    trainer, model = slurm_trainer(others=True, **{where: True}), Hooks()
    agree_on_requeue(trainer, model, Patches())
    model.on_train_batch_end()
    assert trainer.handled == []
    model.on_train_epoch_end()
    assert trainer.handled == [("USR1", None)]


@pytest.mark.parametrize(
    "options",
    [{"world_size": 1}, {"fn": "validate"}, {"environment": SLURMEnvironment(False)}, {"environment": object()}],
)
def test_lightnings_own_handler_stays_where_there_is_nothing_to_agree_on(options):
    trainer, model = slurm_trainer(others=True, **options), Hooks()
    agree_on_requeue(trainer, model, Patches())
    model.on_train_batch_end()
    assert trainer.handled == []
    trainer._signal_connector._slurm_sigusr_handler_fn("USR1", None)
    assert trainer.handled == [("USR1", None)]
