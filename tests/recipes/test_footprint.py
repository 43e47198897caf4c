"""The memory that recipes say they will take is that of their own loss, followed on real tensors."""

from types import SimpleNamespace

import pytest
import torch

import lightning_lora as ll
from lightning_lora.analysis.memory_trace import trace
from lightning_lora.injection.freeze import train_mode
from lightning_lora.ops import operand
from lightning_lora.recipes import DPO, CausalLM, Seq2SeqLM, SequenceClassifier
from lightning_lora.recipes.footprint import footprint, strategy_of
from lightning_lora.recipes.language import LARGE
from tests.analysis.test_memory import stored
from tests.recipes import files

LORA = ll.LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.05)
ROWS, TOKENS = 4, 64


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A causal model with a head of its own for many tokens, and two others."""
    folder = tmp_path_factory.mktemp("bases")
    files.llama(folder / "large", vocab_size=LARGE, tie_word_embeddings=False)
    files.llama(folder / "small")
    files.bert(folder / "bert")
    files.t5(folder / "t5")
    return folder


CASES = {
    "causal": (CausalLM, "small", {}),
    "causal, large": (CausalLM, "large", {}),
    "dpo": (DPO, "small", {}),
    "dpo, large": (DPO, "large", {}),
    "seq2seq": (Seq2SeqLM, "t5", {}),
    "classes": (SequenceClassifier, "bert", {"labels": ["a", "b", "c"]}),
    "numbers on the mean": (SequenceClassifier, "bert", {"regression": True, "pooling": "mean"}),
}


def batch_of(recipe):
    ids = torch.randint(3, 320, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # as batches have it: attention takes masks then
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if isinstance(recipe, SequenceClassifier):
        batch["labels"] = torch.zeros(ROWS, dtype=torch.long)
    return batch | {f"rejected_{key}": value for key, value in batch.items() if isinstance(recipe, DPO)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef`")
def test_it_is_what_the_loss_takes(bases, case):
    kind, base, options = CASES[case]
    recipe = kind(str(bases / base), **options)
    expected = footprint(recipe, LORA, None, batch_size=ROWS, seq_len=TOKENS)
    assert recipe.model is None  # nothing was loaded for it
    recipe.configure_model()
    assert footprint(recipe, LORA, None, batch_size=ROWS, seq_len=TOKENS) == expected
    ll.inject(recipe, LORA)
    train_mode(recipe, ["default"])
    batch = batch_of(recipe)
    assert recipe(batch).item() > 0  # a first pass has looked at what is looked at once
    vars(operand._KEPT).clear()
    parts, inputs, seen = expected.parts, sum(t.nbytes for t in batch.values()), trace(recipe, lambda: recipe(batch))
    assert parts.base + parts.adapters + parts.in_full == stored(recipe)
    assert parts.gradients == seen.gradients
    assert parts.activations - inputs == pytest.approx(seen.held, rel=0.03)
    peak = max(seen.forward_peak + seen.gradients, seen.backward_peak)
    assert parts.gradients + parts.activations - inputs + parts.temporary == pytest.approx(peak, rel=0.03)


def test_no_logits_of_all_tokens_are_counted_where_none_are_made(bases):
    """They alone would take 17 MB in float32, twice: for the loss and its gradient."""
    found = [
        footprint(CausalLM(str(bases / base)), LORA, None, batch_size=4, seq_len=64) for base in ("large", "small")
    ]
    (large, small), logits = (each.parts.activations for each in found), 4 * 64 * LARGE * 4
    assert large - small < logits / 4


def test_an_untied_head_and_the_dtype_of_the_files_count(tmp_path, bases):
    """A head outside of the backbone, in float32 as it is stored; 4 bits leave it as it is."""
    seen = footprint(CausalLM(str(bases / "large")), LORA, "nf4-dq", batch_size=1, seq_len=8)
    (head,) = [layer for layer in seen.layers if layer.name == "model.lm_head"]
    assert (head.bits, head.bytes) == (32, LARGE * 32 * 4)
    halved = footprint(CausalLM(str(bases / "large"), dtype="bfloat16"), LORA, None, batch_size=1, seq_len=8)
    assert {layer.bits for layer in halved.layers if layer.bits} == {16}


def test_what_can_not_be_followed_has_no_footprint_and_says_why(bases, caplog):
    class Looking(CausalLM):
        def forward(self, batch):
            return super().forward(batch) * int(batch["labels"].sum())

    with caplog.at_level("INFO"):
        assert footprint(Looking(str(bases / "small")), LORA, None, batch_size=1, seq_len=8) is None
    assert "memory is not estimated beforehand: " in caplog.text


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("SingleDeviceStrategy", None, "ddp"),
        ("FSDPStrategy", None, "fsdp"),
        ("ModelParallelStrategy", None, "fsdp2"),
        ("DeepSpeedStrategy", 2, "deepspeed_stage_2"),
        ("DeepSpeedStrategy", 0, "ddp"),
    ],
)
def test_strategies_share_as_they_do(name, stage, expected):
    strategy = type(name, (), {"config": {"zero_optimization": {"stage": stage}}})()
    assert strategy_of(SimpleNamespace(strategy=strategy)) == expected
