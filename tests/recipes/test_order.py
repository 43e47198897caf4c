"""Where a run goes on: behind what it has seen, in an epoch of the same examples, or not at all."""

import lightning.pytorch as pl
import pytest

import lightning_lora as ll
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.order import EpochSampler
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


def fit(base, path, ckpt_path=None, **options):
    saver = pl.callbacks.ModelCheckpoint(dirpath="saved", every_n_train_steps=4, filename="{step}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 1),
        callbacks=[ll.LoRA(r=4), saver],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM(base, schedule="constant")
    data = TextDataModule(path, **{"batch_size": 4, "val_split": 0.2, "max_length": 64, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer.global_step


@pytest.mark.filterwarnings("ignore:.*ckpt_path=.*:UserWarning")
def test_a_run_goes_on_with_its_own_examples_only(llama, tmp_path):
    """Fewer, more, or packed, they would be trained on twice or never; the epoch behind a whole one is trained on."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(40))
    assert fit(llama, path) == 8
    for records, options in ((20, {}), (80, {}), (40, {"packing": True}), (40, {"seed": 1})):
        other = files.jsonl(tmp_path / f"{records}.jsonl", files.prompts(records))
        with pytest.raises(ll.CheckpointError, match="go on with that run's data, .* or begin a new run"):
            fit(llama, other, "saved/step=4.ckpt", max_epochs=2, **options)
    with pytest.raises(ll.CheckpointError, match=r"give the data.num_workers it had"):
        fit(llama, path, "saved/step=4.ckpt", max_epochs=2, num_workers=1)
    assert fit(llama, path, "saved/step=8.ckpt", max_epochs=2) == 16
