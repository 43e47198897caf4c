"""Resuming at the end of an epoch, from files of whole runs and of resumed ones: the batches and weights of one run."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_lora as ll
from lightning_lora.recipes.order import EpochSampler, resumable
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, data

EXAMPLES = data().dataset  # 32, so 4 batches of 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter([EXAMPLES[i] for i in range(len(EXAMPLES))])


def with_sampler(kind, sampler, workers):
    return lambda: kind(EXAMPLES, batch_size=8, sampler=sampler(), num_workers=workers)


def distributed():
    return DistributedSampler(EXAMPLES, 1, 0)


def of_recipes():
    return EpochSampler(EXAMPLES, 1, 0, seed=0)


SAVED = {  # loaders that save where they are
    "stateful": lambda: StatefulDataLoader(EXAMPLES, batch_size=8, shuffle=True),
    "stateful, a worker": lambda: StatefulDataLoader(EXAMPLES, batch_size=8, shuffle=True, num_workers=1),
    "recipes": with_sampler(resumable(), of_recipes, 0),
    "recipes, a worker": with_sampler(resumable(), of_recipes, 1),
}
LOADERS = {
    **SAVED,
    "plain": lambda: data(shuffle=True),
    "distributed": with_sampler(DataLoader, distributed, 0),
    "distributed, a worker": with_sampler(DataLoader, distributed, 1),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
}
BEHIND = {"every_n_train_steps": 4, "save_on_train_epoch_end": False}  # behind an epoch's last batch


class Seen(pl.Callback):
    """Which batches a run sees, in which epoch, behind how many steps, and with which random numbers."""

    def __init__(self):
        self.batches, self.begun = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.begun.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        where = trainer.current_epoch, batch_idx, trainer.global_step
        self.batches.append((*where, float(batch[0].sum()), int(torch.get_rng_state().double().sum())))


def fit(folder, loader, ckpt_path=None, seed=1, checkpoint=BEHIND, validation=None, **options):
    """What a run sees, and the weights that it ends with; its files are in the folder."""
    pl.seed_everything(seed, verbose=False)
    module, seen = Lit(), Seen()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)
    own = {"max_epochs": 4, "num_sanity_val_steps": 0, **options}
    run = trainer(ll.LoRA(r=4, lora_dropout=0.2), saver, seen, **own)
    run.fit(module, loader(), validation, ckpt_path=ckpt_path)
    return seen, {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}


def assert_goes_on(rest, whole):
    (seen, weights), (all_seen, all_weights) = rest, whole
    assert seen.batches == all_seen.batches[-len(seen.batches) :]
    assert seen.begun == all_seen.begun[-len(seen.begun) :]
    assert all(torch.equal(weights[key], all_weights[key]) for key in all_weights)


def assert_resumes_twice(tmp_path, loader, second=8, **options):
    """From a file of the whole run, and from one that this resumed run has written."""
    whole = fit(tmp_path / "whole", loader, **options)
    rest = fit(tmp_path / "rest", loader, tmp_path / "whole" / "step=4.ckpt", seed=9, **options)
    assert_goes_on(rest, whole)
    assert len(rest[0].batches) == 12
    again = fit(tmp_path / "again", loader, tmp_path / "rest" / f"step={second}.ckpt", seed=5, **options)
    assert_goes_on(again, whole)
    assert len(again[0].batches) == 16 - second


@pytest.mark.parametrize("kind", LOADERS)
def test_behind_the_last_batch(tmp_path, kind):
    assert_resumes_twice(tmp_path, LOADERS[kind])


@pytest.mark.parametrize("kind", SAVED)
def test_behind_the_last_batch_and_then_within_an_epoch(tmp_path, kind):
    own = {"every_n_train_steps": 2, "save_on_train_epoch_end": False}
    assert_resumes_twice(tmp_path, SAVED[kind], second=10, checkpoint=own)


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if not kind.startswith("stateful")])
def test_at_the_end_of_an_epoch(tmp_path, kind):
    """Lightning loads no state of a loader then, so that one which shuffles by numbers of its own takes others."""
    assert_resumes_twice(tmp_path, LOADERS[kind], checkpoint={})


@pytest.mark.parametrize("checkpoint", [BEHIND, {}])
@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("kind", ["plain", "stateful", "recipes"])
def test_a_run_of_so_many_steps(tmp_path, kind, validates, checkpoint):
    validation = DataLoader(EXAMPLES, batch_size=8, generator=torch.Generator()) if validates else None
    options = {"checkpoint": checkpoint, "validation": validation, "max_steps": 16, "max_epochs": None}
    assert_resumes_twice(tmp_path, LOADERS[kind], **options)


@pytest.mark.parametrize("first", [{"max_steps": 8, "max_epochs": None}, {"max_epochs": 2}, {"max_steps": 8}], ids=str)
@pytest.mark.parametrize("then", [{"max_steps": 16, "max_epochs": None}, {"max_epochs": 4}, {"max_steps": 16}], ids=str)
@pytest.mark.parametrize("kind", ["plain", "distributed", "stream", "recipes"])
def test_behind_a_fit_that_ended_with_an_epoch(tmp_path, kind, first, then):
    """By ``trainer.save_checkpoint``; with plain Lightning an epoch of one batch would come first.

    A loader that saves its state draws a random number when it is asked for it there, in torchdata.
    """
    whole = fit(tmp_path / "whole", LOADERS[kind], **then)
    pl.seed_everything(1, verbose=False)
    module = Lit()
    run = trainer(ll.LoRA(r=4, lora_dropout=0.2), **{"max_epochs": 4, "num_sanity_val_steps": 0, **first})
    run.fit(module, LOADERS[kind]())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    rest = fit(tmp_path / "rest", LOADERS[kind], path, seed=2, **then)
    assert [batch[:4] for batch in rest[0].batches] == [batch[:4] for batch in whole[0].batches[8:]]
    if kind != "recipes":
        assert_goes_on(rest, whole)


@pytest.mark.parametrize("kind", ["plain", "stateful", "recipes"])
def test_epochs_of_some_batches(tmp_path, kind):
    """The loader is not at its end when the epoch is."""
    own = {"every_n_train_steps": 2, "save_on_train_epoch_end": False}
    options = {"checkpoint": own, "limit_train_batches": 2, "max_epochs": 8}
    assert_resumes_twice(tmp_path, LOADERS[kind], **options)


@pytest.mark.parametrize("checkpoint", [BEHIND, {}, {"save_on_train_epoch_end": False}])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_loaders_that_are_made_anew(tmp_path, every, checkpoint):
    """In the epochs in which a whole run makes them, and with the order that they have there."""
    validation = DataLoader(EXAMPLES, batch_size=8, generator=torch.Generator())
    options = {"checkpoint": checkpoint, "validation": validation, "reload_dataloaders_every_n_epochs": every}
    assert_resumes_twice(tmp_path, LOADERS["plain"], **options)


def test_a_validation_that_the_file_was_ahead_of_is_not_made_up_for(tmp_path):
    """So it must not draw, which it does once for each loader without a generator of its own."""
    own = DataLoader(EXAMPLES, batch_size=8, generator=torch.Generator())
    assert_resumes_twice(tmp_path, LOADERS["recipes"], validation=own)
