"""The estimate of memory against what is there, and the tables of docs/memory.md against both."""

from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.analysis.memory_trace import Storages, trace
from lightning_lora.injection.freeze import train_mode
from lightning_lora.ops import operand
from lightning_lora.patches import Patches
from lightning_lora.recompute import checkpoint_activations
from tests.analysis.memory_tables import PAGE, llama_row, rows_in, way
from tests.analysis.memory_tables import llama as llama_of_size
from tests.benchmarks.speed.held import held_bytes
from tests.helpers.modules import Wrapped, one_batch, trainer

TOLERANCE = 0.05
BATCH, TOKENS = 2, 48
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
METHODS = {"LoRA": {}, "DoRA": {"use_dora": True}, "QLoRA": {}}


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=500, num_key_value_heads=2, **SIZES))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=500, n_embd=128, n_layer=3, n_head=4))


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=500, num_labels=3, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 320, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=500, decoder_start_token_id=0, **sizes))


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=64, patch_size=8, num_labels=3, **SIZES))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape)


FAMILIES = {
    "Llama": (llama, lambda: {"input_ids": ids(BATCH, TOKENS), "labels": ids(BATCH, TOKENS)}),
    "GPT-2": (gpt2, lambda: {"input_ids": ids(BATCH, TOKENS), "labels": ids(BATCH, TOKENS)}),
    "BERT classifier": (bert, lambda: {"input_ids": ids(BATCH, TOKENS), "labels": ids(BATCH)}),
    "T5": (t5, lambda: {"input_ids": ids(BATCH, TOKENS), "labels": ids(BATCH, TOKENS)}),
    "ViT classifier": (vit, lambda: {"pixel_values": torch.randn(BATCH, 3, 64, 64), "labels": ids(BATCH)}),
}


@dataclass(frozen=True)
class Row:
    """Estimated and measured bytes of one way to train one model."""

    family: str
    method: str
    checkpointing: bool
    estimated: dict[str, int]
    measured: dict[str, int]

    def cells(self) -> list[str]:
        """The row of the table in the docs."""
        pairs = [f"{value:,}" for key, own in self.estimated.items() for value in (own, self.measured[key])]
        return [self.family, self.method, "yes" if self.checkpointing else "no", *pairs]


def measure(model: nn.Module, batch: dict, config: ll.LoRAConfig, quantization: str | None, again: bool) -> dict:
    """What is there: bytes of tensors in a model that trains, not of shapes."""
    ll.inject(model, config)
    if quantization is not None:
        ll.quantize(model, quantization)
    train_mode(model, ["default"])
    if again:
        checkpoint_activations(model, Patches())
    held = held_bytes(lambda: model(**batch).loss)
    model.zero_grad()
    vars(operand._KEPT).clear()  # a device makes the memory for one product anew, which counts
    peak = trace(model, lambda: model(**batch).loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return {
        "weights": stored(model),
        "optimizer": sum(value.nbytes for value in states),
        "held": held,
        "peak": max(peak.forward_peak + peak.gradients, peak.backward_peak),
    }


def stored(model: nn.Module) -> int:
    """Bytes of all weights and buffers, with what unpacks them."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax]
            tensors += [state.offset, state.state2.absmax] if state.nested else []
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def compare(family: str, method: str, again: bool) -> Row:
    build, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model = build().eval()
    config = ll.LoRAConfig(r=4, lora_alpha=6, **METHODS[method])
    quantization = "nf4-dq" if method == "QLoRA" else None
    options = {"batch_size": BATCH, "seq_len": TOKENS, "gradient_checkpointing": again}
    found = ll.estimate_memory(model, config, quantization, **options)
    batch = make_batch()
    inputs = sum(value.nbytes for value in batch.values())
    parts = found.parts
    estimated = {
        "weights": parts.base + parts.adapters + parts.in_full,
        "optimizer": parts.optimizer,
        "held": parts.activations - inputs,
        "peak": parts.gradients + parts.activations + parts.temporary - inputs,
    }
    return Row(family, method, again, estimated, measure(model, batch, config, quantization, again))


CASES = [(family, method, again) for family in FAMILIES for method in METHODS for again in (False, True)]


@pytest.mark.parametrize(("family", "method", "again"), CASES)
def test_the_estimate_is_what_is_there(family, method, again):
    row = compare(family, method, again)
    for key, estimated in row.estimated.items():
        assert estimated == pytest.approx(row.measured[key], rel=TOLERANCE), key
    cells = row.cells()
    (documented,) = (
        cells_there for cells_there in rows_in(PAGE.read_text(), "accuracy") if cells_there[:3] == cells[:3]
    )
    now, then = ([int(cell.replace(",", "")) for cell in each[3:]] for each in (cells, documented))
    assert now == pytest.approx(then, rel=TOLERANCE), "write the docs anew: python -m tests.analysis.memory_tables"


def test_the_table_of_llamas():
    found = way(llama_of_size("7B"), "QLoRA, nf4-dq")
    assert (found.parameters, found.trainable) == (6_738_415_616 + 39_976_960, 39_976_960)
    row = llama_row("7B", "QLoRA, nf4-dq", found)
    assert row in rows_in(PAGE.read_text(), "llamas"), "write the docs anew: python -m tests.analysis.memory_tables"


class Peak(pl.Callback):
    """The most bytes in one step of a run, of what was made since the run began."""

    def __init__(self, storages: Storages) -> None:
        self.storages = storages

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.storages.peak = self.storages.alive


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_in_a_trainer(method):
    """The peak of a whole run: when gradients are freed is Lightning's to say, and when norms are taken DoRA's."""
    module, batch = Wrapped(lambda: llama().eval()), FAMILIES["Llama"][1]()
    options = {"r": 4, "lora_alpha": 6, **METHODS[method]}
    found = ll.estimate_memory(module, ll.LoRAConfig(**options), batch_size=BATCH, seq_len=TOKENS).parts
    with Storages() as storages:
        trainer(ll.LoRA(**options), Peak(storages)).fit(module, one_batch(batch, times=3))
    inputs = sum(value.nbytes for value in batch.values())
    assert storages.peak == pytest.approx(found.total - found.base - inputs, rel=TOLERANCE)
