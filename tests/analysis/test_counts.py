"""Counts as PEFT and Lightning print them, and right for packed weights."""

import copy

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch import nn

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.toy import Lit, data


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("family", "targets", "heads", "options"),
    [
        ("llama", ["q_proj", "v_proj"], None, {}),
        ("llama", ["q_proj", "down_proj"], None, {"use_dora": True, "rank_pattern": {"down_proj": 2}}),
        ("qwen2-tied", ["q_proj", "embed_tokens"], None, {}),
        ("gpt2", ["c_attn"], None, {}),
        ("bert", ["query", "value"], ["classifier"], {}),
    ],
)
def test_trainable_and_all_are_those_that_peft_prints(family, targets, heads, options):
    base = FAMILIES[family].make()
    model = copy.deepcopy(base)
    ll.inject(model, ll.LoRAConfig(r=4, target_modules=targets, modules_to_save=heads, **options))
    config = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=heads, fan_in_fan_out=family == "gpt2", **options
    )
    trainable, total = peft.get_peft_model(base, config).get_nb_trainable_parameters()
    counts = ll.summary(model)
    assert counts.trainable == trainable == counts.adapters.parameters + counts.in_full.parameters
    assert counts.total == total - counts.in_full.parameters  # PEFT keeps the head that it replaced, and counts both
    assert counts.percent == 100 * counts.trainable / counts.total


def test_packed_ones_too():
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Embedding(50, 64), bnb.nn.Linear4bit(64, 128, quant_type="nf4"), nn.Linear(128, 5)).to(
        "cpu"
    )
    config = peft.LoraConfig(r=4, target_modules=["2"])
    counts = ll.summary(peft.get_peft_model(model, config))
    trainable, total = 4 * (128 + 5), 50 * 64 + 64 * 128 + 128 + 128 * 5 + 5 + 4 * (128 + 5)
    assert (counts.trainable, counts.total) == (trainable, total)


class Printed:
    """Keeps what a summary is told to print, and prints it."""

    def summarize(self, summary_data, total, trainable, size, modes, total_flops, **options):
        self.told = dict(zip(*[column for _, column in summary_data[1:4:2]], strict=True)), total, trainable, size
        super().summarize(summary_data, total, trainable, size, modes, total_flops=total_flops, **options)


class Plain(Printed, ModelSummary):
    pass


class Rich(Printed, RichModelSummary):
    pass


def printed(summary: Printed, module: pl.LightningModule, **options) -> tuple[dict[str, str], int, int, float]:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[summary, ll.LoRA(r=2, **options)],
    )  # fmt: skip
    trainer.fit(module, data())
    assert "summarize" not in vars(summary)  # the wrapper is off
    return summary.told


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [(None, 4), ("nf4", 0.5), ("int8", 1)])
@pytest.mark.parametrize("summary", [Plain, Rich])
def test_lightnings_own_table(capsys, summary, quantization, bytes_per_weight):
    module = Lit()
    dense = sum(parameter.numel() for parameter in module.parameters())
    rows, total, trainable, size = printed(summary(max_depth=4), module, quantization=quantization)
    adapters, head, packed = 4 * 2 * (16 + 16), 16 * 4 + 4, 4 * 16 * 16
    assert (total, trainable) == (dense + adapters, adapters + head)
    assert size == pytest.approx((4 * (dense + adapters - packed) + bytes_per_weight * packed) / 1e6)
    assert rows["net.blocks.0.q"].strip() == str(16 * 16 + 16 + 2 * (16 + 16))
    assert rows["net.head"].strip() == str(head)
    if summary is Rich:
        assert "net.blocks.0.q" in capsys.readouterr().out


def test_parameters_of_no_module():
    class Extra(Lit):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7), requires_grad=False)

    rows, total, *_ = printed(Plain(), Extra(), quantization="nf4")
    assert rows["other params"].strip() == "7"
    assert total == 7 + sum(parameter.numel() for parameter in Lit().parameters()) + 4 * 2 * (16 + 16)
