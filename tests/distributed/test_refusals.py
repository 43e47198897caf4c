"""What can't be right on several ranks is an error on each of them, before the first step."""

import pytest
import torch

from tests.distributed.test_strategies import launch, result

pytestmark = pytest.mark.gloo

TWO = {
    "another-base": {"strategy": "ddp", "by_rank": {"seed": [1, 2]}},
    "sent-base": {"strategy": "ddp", "by_rank": {"seed": [1, 2]}, "lora": {"sync_base": True, "use_dora": True}},
    "sent-4-bit": {
        "strategy": "ddp",
        "by_rank": {"seed": [1, 2]},
        "lora": {"sync_base": True, "quantization": "nf4-dq"},
    },
    "sent-fsdp2": {"strategy": "fsdp2", "by_rank": {"seed": [1, 2]}, "lora": {"sync_base": True, "use_dora": True}},
    **{
        f"{kind}-packed-{mode}": {
            "strategy": "ddp",
            "module": {"packed": mode},
            "by_rank": {"seed": [1, 1 if kind == "same" else 2]},
            "lora": {"sync_base": kind == "sent"},
        }
        for kind in ("same", "another", "sent")
        for mode in ("nf4-dq", "int8")
    },
    "same": {"strategy": "ddp", "lora": {"use_dora": True}},
    "same-4-bit": {"strategy": "ddp", "lora": {"quantization": "nf4-dq"}},
    "another-fsdp2": {"strategy": "fsdp2", "by_rank": {"seed": [1, 2]}},
    "another-r": {"strategy": "ddp", "by_rank": {"lora_dropout": [0.0, 0.1]}},
    "quantise-late": {"strategy": "fsdp2", "module": {"built": "configure_model"}, "lora": {"quantization": "nf4"}},
    "quantised-tp": {"strategy": "tp", "lora": {"quantization": "nf4"}},
    "flat": {"strategy": "fsdp-flat"},
    "wrapped": {"strategy": "fsdp", "module": {"wrapped": True}},
    "shard-fsdp": {"strategy": "fsdp", "lora": {"shard_adapters": True}},
    "folders": {"strategy": "fsdp2", "lora": {"save_sharded": True, "save_peft": True}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    there, lost = (str(folder / name / "epoch=0.ckpt") for name in ("same", "nowhere"))
    resumed = {
        f"{kind}-{strategy}": {
            "strategy": strategy,
            "lora": {"use_dora": True},
            "by_rank": {"ckpt": [there, other]},
            "epochs": 2,
        }
        for strategy in ("ddp", "fsdp", "fsdp2")
        for kind, other in (("none", None), ("lost", lost))
    }
    runs = {name: {"epochs": 1, **options} for name, options in {**TWO, **resumed}.items()}
    launch(folder, 2, runs)
    return folder


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("another-base", "BaseMismatchError", ["rank 1 holds another base model", "net.blocks.0", "sync_base=True"]),
        ("another-fsdp2", "BaseMismatchError", ["rank 1 holds another base model", "sync_base=True"]),
        ("another-packed-nf4-dq", "BaseMismatchError", ["rank 1 holds another base model", "net.blocks.0.q.weight"]),
        ("another-packed-int8", "BaseMismatchError", ["rank 1 holds another base model", "net.blocks.0.q.weight"]),
        ("another-r", "ConfigError", ["default: lora_dropout: 0.0 on rank 0, 0.1 on rank 1"]),
        (
            "none-ddp",
            "ConfigError",
            ["ckpt_path: 'epoch=0.ckpt' on rank 0, None on rank 1", "logged with sync_dist=True"],
        ),
        ("none-fsdp", "ConfigError", ["ckpt_path: 'epoch=0.ckpt' on rank 0, None on rank 1"]),
        ("none-fsdp2", "ConfigError", ["ckpt_path: 'epoch=0.ckpt' on rank 0, None on rank 1"]),
        ("lost-ddp", "CheckpointError", ["rank 1 has no ", "epoch=0.ckpt, and rank 0 has: copy it"]),
        ("lost-fsdp", "CheckpointError", ["rank 1 has no ", "epoch=0.ckpt, and rank 0 has: copy it"]),
        ("lost-fsdp2", "CheckpointError", ["rank 1 has no ", "epoch=0.ckpt, and rank 0 has: copy it"]),
        ("quantise-late", "TargetError", ["is sharded already: call ll.quantize(model, 'nf4') before fully_shard"]),
        ("quantised-tp", "UnsupportedError", ["net.blocks.0.q", "cut for tensor parallelism"]),
        ("flat", "ConfigError", ["use_orig_params=False"]),
        ("wrapped", "UnsupportedError", ["net.blocks.0, net.blocks.1: wrapped in FullyShardedDataParallel before"]),
        ("folders", "ConfigError", ["save_sharded=True writes no PEFT folders", "lightning-lora export"]),
        ("shard-fsdp", "UnsupportedError", ["ModelParallelStrategy can shard them"]),
    ],
)
def test_refused_on_every_rank(runs, name, error, words):
    for file in ("result.pt", "rank1.pt"):
        found = torch.load(runs / name / file, weights_only=True)["error"]
        assert found.startswith(error), found
        assert all(word in found for word in words), found
    assert not list((runs / name).glob("*.ckpt"))


@pytest.mark.parametrize(
    ("sent", "same"),
    [
        ("sent-base", "same"),
        ("sent-4-bit", "same-4-bit"),
        ("sent-fsdp2", "same"),
        ("sent-packed-nf4-dq", "same-packed-nf4-dq"),
        ("sent-packed-int8", "same-packed-int8"),
    ],
)
def test_a_base_that_is_sent_is_that_of_rank_0(runs, sent, same):
    """Also for what derives from it: the magnitude of DoRA, packed weights."""
    assert result(runs / sent)["val_loss"] == pytest.approx(result(runs / same)["val_loss"], rel=1e-5)
