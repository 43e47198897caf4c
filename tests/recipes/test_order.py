"""Where a run goes on: behind what it has seen, in an epoch of the same examples, or not at all."""

import lightning.pytorch as pl
import pytest
import torch

import lightning_lora as ll
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.order import EpochSampler
from lightning_lora.recipes.parts import Feed
from tests.helpers.modules import trainer
from tests.recipes import files


def test_a_place_in_the_order_is_the_same_for_other_devices():
    """What two devices have seen by then, one device does not see again; behind the end the next epoch begins."""
    own = [EpochSampler(range(24), 2, rank, seed=3) for rank in (0, 1)]
    seen = {next(sampled) for sampled in map(iter, own) for _ in range(4)}
    alone = EpochSampler(range(24), 1, 0, seed=3)
    alone.load_state_dict({**own[0].state_dict(), "yielded": 4})
    assert {*alone} | seen == {*range(24)}
    before = EpochSampler(range(24), 1, 0, seed=3)
    before.set_epoch(1)
    alone.load_state_dict({**own[0].state_dict(), "yielded": 12})
    assert (alone.epoch, [*alone]) == (1, [*before])


def test_another_epoch_begins_at_its_first_example():
    """Where an epoch has fewer batches than the loader, the place that was loaded is in the one before."""
    resumed, other = EpochSampler(range(24), 1, 0, seed=3), EpochSampler(range(24), 1, 0, seed=3)
    resumed.load_state_dict({**other.state_dict(), "yielded": 12})
    for sampler in (resumed, other):
        sampler.set_epoch(1)
    assert [*resumed] == [*other]


@pytest.mark.parametrize(("size", "seed"), [(16, 0), (64, 0), (32, 1)])
def test_the_order_of_other_examples_is_refused(size, seed):
    sampler = EpochSampler(range(32), 1, 0, seed=0)
    other = EpochSampler(range(size), 1, 0, seed=seed)
    other.load_state_dict(sampler.state_dict())  # nothing was seen
    found = {**sampler.state_dict(), "yielded": 20}
    with pytest.raises(
        ll.CheckpointError, match=rf"of 32 examples \(seed 0\), and here one has {size} \(seed {seed}\)"
    ):
        other.load_state_dict(found)
    other.load_state_dict({"yielded": 5, "epoch": 2})  # of checkpoints that do not say what they are of
    assert len([*other]) == size - 5


@pytest.mark.parametrize("workers", [0, 1])
def test_runs_that_are_broken_off_twice_take_the_steps_of_one(llama, tmp_path, workers):
    """At the last batch of an epoch, ahead of its validation, which draws nothing that the next epoch would."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(40))

    def run(name, ckpt_path=None, seed=1):
        pl.seed_everything(seed, verbose=False)
        own = {"every_n_train_steps": 1, "save_on_train_epoch_end": False, "filename": "{step}", "save_top_k": -1}
        saver = pl.callbacks.ModelCheckpoint(name, **own)
        module = CausalLM(llama, schedule="constant", lr=1e-2)
        data = TextDataModule(path, batch_size=4, val_split=0.2, max_length=64, num_workers=workers)
        options = {"max_epochs": 4, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
        run = trainer(ll.LoRA(r=4, lora_dropout=0.2), saver, **options)
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return run.global_step, ll.adapter_state_dict(module)

    steps, weights = run("whole")
    assert steps == 12
    run("rest", "whole/step=6.ckpt", seed=9)
    again = run("again", "rest/step=9.ckpt", seed=5)
    assert again[0] == steps
    assert all(torch.equal(again[1][key], weights[key]) for key in weights)


def fit(base, path, ckpt_path=None, **options):
    saver = pl.callbacks.ModelCheckpoint(dirpath="saved", every_n_train_steps=4, filename="{step}", save_top_k=-1)
    run = trainer(ll.LoRA(r=4), saver, max_epochs=options.pop("max_epochs", 1), limit_val_batches=0)
    module = CausalLM(base, schedule="constant")
    data = TextDataModule(path, **{"batch_size": 4, "val_split": 0.2, "max_length": 64, **options})
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return run.global_step


@pytest.mark.filterwarnings("ignore:.*ckpt_path=.*:UserWarning")
def test_a_run_goes_on_with_its_own_examples_only(llama, tmp_path):
    """Fewer, more, or packed, they would be trained on twice or never; the epoch behind a whole one is trained on."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(40))
    assert fit(llama, path) == 8
    for records, options in ((20, {}), (80, {}), (40, {"packing": True}), (40, {"seed": 1})):
        other = files.jsonl(tmp_path / f"{records}.jsonl", files.prompts(records))
        with pytest.raises(ll.CheckpointError, match="go on with that run's data, .* or begin a new run"):
            fit(llama, other, "saved/step=4.ckpt", max_epochs=2, **options)
    other = files.jsonl(tmp_path / "b.jsonl", files.prompts(40)[::-1])
    with pytest.raises(ll.CheckpointError, match=r"as many examples, but others, .*: go on with that run's data"):
        fit(llama, other, "saved/step=4.ckpt", max_epochs=2)
    with pytest.raises(ll.CheckpointError, match=r"give the data.num_workers it had"):
        fit(llama, path, "saved/step=4.ckpt", max_epochs=2, num_workers=1)
    moved = files.jsonl(tmp_path / "moved" / "c.jsonl", files.prompts(40))
    assert fit(llama, moved, "saved/step=8.ckpt", max_epochs=2) == 16


def test_the_share_of_a_batch_is_of_the_tokens_of_all_devices_in_its_step():
    """In the last step of an epoch that is limited only the batches that come count."""
    learnt = torch.arange(1, 25)
    for rank in (0, 1):
        sampler = EpochSampler(range(24), 2, rank, seed=3)
        feed, order = Feed(sampler, 2, learnt), sampler.order()
        counts = [int(learnt[order[4 * i : 4 * i + 4][rank::2]].sum()) for i in range(6)]
        totals = [int(learnt[order[4 * i : 4 * i + 4]].sum()) for i in range(6)]
        assert feed.share(1, counts[1], 2, 5) == pytest.approx(2 * 2 * counts[1] / (totals[0] + totals[1]))
        assert feed.share(4, counts[4], 2, 5) == pytest.approx(2 * 2 * counts[4] / totals[4])
        assert feed.share(4, counts[4], 2, 6) == pytest.approx(2 * 2 * counts[4] / (totals[4] + totals[5]))


def test_an_order_that_is_asked_for_again_is_whole():
    sampler = EpochSampler(range(24), 1, 0, seed=3)
    whole = [*sampler]
    sampler.load_state_dict({**sampler.state_dict(), "yielded": 20})
    assert [*sampler] == whole[20:]
    assert [*sampler] == whole
