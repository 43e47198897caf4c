"""What an estimate counts, part by part, and what it refuses."""

import json

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.analysis.memory_cards import CARDS, RESERVE, card_bytes
from lightning_lora.analysis.memory_optimizer import OPTIMIZERS, optimizer_bytes, optimizer_name
from lightning_lora.analysis.memory_strategy import STRATEGIES
from lightning_lora.ops import operand
from tests.analysis.test_memory import BATCH, SIZES, TOKENS, bert, ids, llama, stored
from tests.benchmarks.speed.held import held_bytes
from tests.helpers.families import FAMILIES

CONFIG = ll.LoRAConfig(r=4, lora_alpha=6)
GB = 10**9
FOUR = {"strategy": "fsdp2", "devices": 4}
WIDE = tf.LlamaConfig(num_hidden_layers=2)  # the defaults are those of LLaMA-7B, which has 32


def on_meta(config: tf.LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(config).eval()


def estimate(model: nn.Module, config: ll.LoRAConfig | None = CONFIG, *args, **options) -> ll.MemoryEstimate:
    return ll.estimate_memory(model, config, *args, **{"batch_size": BATCH, "seq_len": TOKENS, **options})


def tokens() -> dict[str, Tensor]:
    return {"input_ids": ids(BATCH, TOKENS), "labels": ids(BATCH, TOKENS)}


def held_of(found: ll.MemoryEstimate, batch: dict[str, Tensor]) -> int:
    return found.parts.activations - sum(value.nbytes for value in batch.values())


@pytest.mark.parametrize(("mode", "bits"), [(None, 16), ("int8", 8), ("nf4", 4.5), ("nf4-dq", 4.127), ("fp4", 4.5)])
def test_bits_of_the_base(mode, bits):
    found = ll.estimate_memory(on_meta(WIDE), ll.LoRAConfig(r=8), mode, precision="bf16-true", seq_len=8)
    linears = [layer for layer in found.layers if layer.name.endswith("_proj")]
    assert len(linears) == 14
    assert sum(8 * layer.bytes for layer in linears) / sum(layer.parameters for layer in linears) == pytest.approx(
        bits, abs=0.01
    )
    dense = {layer.name: layer.bits for layer in found.layers if layer not in linears and layer.parameters}
    assert set(dense.values()) == {16.0}
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= dense.keys()


def test_counts_of_wide_models():
    model = on_meta(WIDE)
    all_of_it = sum(p.numel() for p in model.parameters())
    packed = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # the linears of blocks
    found = ll.estimate_memory(model, ll.LoRAConfig(r=8), precision="bf16-true", seq_len=8, compare=True)
    trained = 2 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert (found.parameters, found.trainable) == (all_of_it + trained, trained)
    assert found.parts.adapters == 4 * trained
    assert found.parts.base == 2 * all_of_it + 256  # and the frequencies of the rotary embedding
    full, _, qlora = found.compared.values()
    assert full.in_full == full.gradients == 2 * all_of_it
    assert full.optimizer == pytest.approx(4 * all_of_it, rel=1e-6)
    assert qlora.base == pytest.approx(packed * 4.127 / 8 + 2 * (all_of_it - packed), rel=1e-4)


def test_the_model_is_only_read():
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = dict(vars(operand._KEPT))
    find = tf.masking_utils.find_packed_sequence_indices
    modes = [module.training for module in model.modules()]
    estimate(model, CONFIG, "nf4-dq", gradient_checkpointing=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache
    assert vars(operand._KEPT) == kept
    assert tf.masking_utils.find_packed_sequence_indices is find


def test_on_any_device_the_same():
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=500, num_key_value_heads=2, **SIZES)
    assert estimate(on_meta(config)).to_dict() == estimate(tf.LlamaForCausalLM(config).eval()).to_dict()


def test_whole_models_and_heads():
    model, batch = llama().eval(), tokens()
    found = estimate(model, None)
    assert found.parts.in_full == sum(p.nbytes for p in model.parameters())
    assert (found.parts.adapters, found.trainable) == (0, found.parameters)
    assert held_of(found, batch) == pytest.approx(held_bytes(lambda: model(**batch).loss), rel=0.02)
    again = estimate(model, None, gradient_checkpointing=True)
    assert again.parts.activations < 0.5 * found.parts.activations
    assert estimate(bert().eval()).parts.in_full == 4 * (128 * 3 + 3)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed"},
        {"attn_implementation": "eager"},
        {"quantization": "int8"},
        {"quantization": "nf4", "precision": "bf16-true"},
        {"config": ll.LoRAConfig(r=4, lora_dropout=0.1)},
        {"config": ll.LoRAConfig(r=4, lora_dropout=0.1, use_dora=True)},
        {"config": ll.LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"])},
    ],
    ids=str,
)
def test_ways_to_train(options):
    model, batch = llama().eval(), tokens()
    found = estimate(model, **options)
    if options.get("precision") == "bf16-true":
        model.to(torch.bfloat16)
    if "attn_implementation" in options:
        model.set_attn_implementation(options["attn_implementation"])
    ll.inject(model, options.get("config", CONFIG))
    if "quantization" in options:
        ll.quantize(model, options["quantization"])
    model.train()
    autocast = options.get("precision") == "bf16-mixed"

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch).loss

    assert held_of(found, batch) == pytest.approx(held_bytes(loss), rel=0.05)
    assert found.parts.base + found.parts.adapters == pytest.approx(stored(model), rel=0.02)


def test_bases_that_are_packed_already():
    packed = llama().eval()
    ll.quantize(packed, "nf4")
    asked, found = estimate(llama().eval(), CONFIG, "nf4"), estimate(packed)
    assert {**found.to_dict(), "options": None, "setup": 0} == {**asked.to_dict(), "options": None, "setup": 0}
    assert asked.setup == asked.parts.base + 4 * 128 * 320
    assert "full fine-tuning" not in estimate(packed, compare=True).compared
    with pytest.raises(ll.TargetError, match="is quantised already, as 'nf4': 'nf4-dq' needs dense weights"):
        estimate(packed, CONFIG, "nf4-dq")
    with pytest.raises(ll.ConfigError, match="packed weights can't be trained in full"):
        estimate(packed, None)


def test_bases_that_transformers_packed(tmp_path):
    llama().save_pretrained(tmp_path)
    how = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, batch = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=how), tokens()
    found = estimate(model)
    ll.inject(model, CONFIG)
    assert found.parts.base + found.parts.adapters == stored(model)
    assert held_of(found, batch) == pytest.approx(held_bytes(lambda: model(**batch).loss), rel=0.01)


def real_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    classes = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
        "adamw8bit": bnb.optim.AdamW8bit,
        "adam8bit": bnb.optim.Adam8bit,
        "lion": bnb.optim.Lion,
        "lion8bit": bnb.optim.Lion8bit,
        "paged_adamw": bnb.optim.PagedAdamW,
        "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
    }
    if name == "sgd_momentum":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    assert optimizer_name(classes[name]) == name
    return classes[name](parameters, lr=1e-3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optimizers(name):
    shapes = [(8, 1000), (3000, 8), (64,), (3, 5)]
    trained = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = real_optimizer(name, trained)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.startswith("qmap")  # constants of all optimizers
    ]
    found = optimizer_bytes(name, [(shape, torch.float32) for shape in shapes])
    assert found.states == sum(value.nbytes for value in states)
    assert found.paged <= found.states


def test_pages_may_leave_the_device():
    model = on_meta(WIDE)
    found = ll.estimate_memory(model, ll.LoRAConfig(r=64), None, "PagedAdamW8bit", seq_len=8)
    assert found.paged == pytest.approx(found.parts.optimizer, rel=0.01)
    assert found.parts.optimizer == pytest.approx(2 * (1 + 4 / 256) * found.trainable, rel=0.001)
    assert "of optimizer states may leave the device" in str(found)


def test_devices_share():
    model = llama().eval()
    one = estimate(model).parts
    by_strategy = {name: estimate(model, strategy=name, devices=4).parts for name in STRATEGIES}
    assert by_strategy["ddp"].total == one.total + one.gradients  # buckets
    for name in ("fsdp", "fsdp2", "deepspeed_stage_3"):
        assert by_strategy[name].base == -(-one.base // 4)
        assert by_strategy[name].temporary > one.temporary  # blocks are whole while they compute
    assert by_strategy["fsdp2"].adapters == one.adapters
    assert by_strategy["deepspeed_stage_1"].optimizer == -(-one.optimizer // 4)
    assert by_strategy["deepspeed_stage_1"].gradients == one.gradients
    assert by_strategy["deepspeed_stage_2"].gradients == -(-one.gradients // 4)
    assert by_strategy["deepspeed_stage_3"].adapters == -(-one.adapters // 4)
    whole = estimate(model, None, strategy="fsdp2", devices=4).parts
    assert whole.optimizer == pytest.approx(estimate(model, None).parts.optimizer / 4, rel=0.001)
    assert estimate(model, strategy="deepspeed_stage_3").parts == one  # of one device


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_large_adapters_are_sharded_whatever_the_optimizer(optimizer):
    """As a run decides: by 16 bytes for each of their parameters."""
    model = on_meta(WIDE)
    found = {
        r: [ll.estimate_memory(model, ll.LoRAConfig(r=r), None, optimizer, seq_len=8, **run) for run in ({}, FOUR)]
        for r in (64, 1024)
    }
    for one, each in found.values():
        is_large = 16 * one.trainable > 1 << 30
        assert each.parts.adapters == (-(-one.parts.adapters // 4) if is_large else one.parts.adapters)
    assert {16 * one.trainable > 1 << 30 for one, _ in found.values()} == {True, False}


def test_what_makes_it_fit():
    model = on_meta(tf.LlamaConfig(num_hidden_layers=1))
    run = {"config": ll.LoRAConfig(r=16), "precision": "bf16-true", "batch_size": 1, "seq_len": 512}
    roomy = ll.estimate_memory(model, card="h100", **run)
    assert (roomy.fits, roomy.changes, roomy.cheapest) == (True, (), None)
    assert "fits a card with 80 GiB" in str(roomy)

    def sized(total: float) -> ll.MemoryEstimate:
        return ll.estimate_memory(model, card=(total + RESERVE) / (1 << 30), **run)

    saves = {change.name: change.saves for change in sized(roomy.total - 1).changes}
    dense = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert saves["nf4-dq"] == pytest.approx(dense * (1 - 4.127 / 16), rel=0.01)
    slightly = sized(roomy.total - 0.5 * saves["optimizer=paged_adamw8bit"])
    assert (slightly.fits, slightly.cheapest.name) == (False, "optimizer=paged_adamw8bit")
    less = sized(roomy.total - saves["nf4-dq"])
    assert less.cheapest.name == "nf4-dq"
    assert less.cheapest.total == roomy.total - saves["nf4-dq"]
    for words in ("does NOT fit a card with ", "  nf4-dq saves 300 MB: ", "cheapest change that fits: nf4-dq"):
        assert words in str(less), words
    together = sized(roomy.total - saves["nf4-dq"] - 0.5 * saves["optimizer=paged_adamw8bit"])
    assert together.cheapest.name.endswith(" + nf4-dq")
    assert "optimizer=paged_adamw8bit + " in together.cheapest.name
    hopeless = sized(0.05 * GB)
    assert hopeless.cheapest is None
    assert "none of these; more or larger cards" in str(hopeless)


def test_phases():
    found = estimate(llama(), CONFIG, "nf4-dq")
    parts, phases = found.parts, found.phases
    assert max(phases.values()) == parts.total == found.total
    weights = parts.base + parts.adapters + parts.in_full + parts.optimizer + parts.gradients
    assert phases["optimizer step"] == weights + 4 * found.trainable  # torch's own, for all tensors at once
    assert min(phases["forward"], phases["backward"]) >= weights + parts.activations
    assert found.host == sum(t.nbytes for t in (*llama().parameters(), *llama().buffers()))
    whole = estimate(on_meta(WIDE), None, batch_size=1, seq_len=8)
    assert whole.total == whole.phases["optimizer step"] > 1.2 * whole.phases["backward"]
    assert "peaks: forward " in str(found)
    assert "of dense weights are there before they are packed" in str(found)


def test_side_by_side():
    found = estimate(llama(), compare=True)
    full, lora, qlora = found.compared.values()
    assert [*found.compared] == ["full fine-tuning", "LoRA", "QLoRA nf4-dq"]
    assert full == estimate(llama(), None).parts
    assert lora == found.parts
    assert qlora == estimate(llama(), CONFIG, "nf4-dq").parts
    assert json.loads(json.dumps(found.to_dict()))["compared"]["LoRA"]["total"] == lora.total
    header, peak = (line for line in str(found).splitlines() if "QLoRA nf4-dq" in line or line.startswith("peak "))
    assert header.split()[:5] == ["on", "each", "device", "this", "run"]
    assert len(peak.split()) == 1 + 2 * 4


def test_models_of_ones_own():
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            self.register_buffer("scale", torch.ones(64))

        def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
            return (self.body(x) + shift) * self.scale

    config = ll.LoRAConfig(r=4, target_modules=["body.*"])
    model, x = Net(), torch.randn(32, 64)
    found = [ll.estimate_memory(model, config, example_inputs=batch) for batch in (x, (x, 1.0), {"x": x, "shift": 1.0})]
    ll.inject(model, config)
    assert found[0].parts.base + found[0].parts.adapters == stored(model)
    assert {held_of(each, {"x": x}) for each in found} == {held_bytes(lambda: model(x).sum().float())}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    family = FAMILIES[name]
    model, config = family.make().eval(), ll.LoRAConfig(r=2, target_modules=family.target_modules)
    batch = family.batch(model)
    dtype = torch.bfloat16 if name == "mixtral" else torch.float32  # torch knows no shapes of its products in float32
    options = (
        {"example_inputs": batch}
        if name == "convnet"
        else {"batch_size": 2, "seq_len": batch.get("input_ids", batch["labels"]).shape[-1]}
    )
    options = {"precision": "bf16-true", **options} if dtype == torch.bfloat16 else options
    found = ll.estimate_memory(model, config, **options)
    ll.inject(model.to(dtype), config)
    assert held_of(found, batch) == pytest.approx(held_bytes(lambda: model(**batch).loss), rel=0.05)
    assert found.parts.base + found.parts.adapters + found.parts.in_full == stored(model)


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "lora_dropout": 0.1}], ids=["lora", "dora"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_adapters_on_experts(implementation, options):
    model = FAMILIES["mixtral"].make()
    model.set_experts_implementation(implementation)
    config = ll.LoRAConfig(r=2, target_modules=["q_proj"], target_parameters="experts", **options)
    batch = FAMILIES["mixtral"].batch(model)
    found = ll.estimate_memory(model, config, precision="bf16-true", example_inputs=batch)
    ll.inject(model.to(torch.bfloat16), config)
    assert held_of(found, batch) == held_bytes(lambda: model(**batch).loss)
    assert found.parts.base + found.parts.adapters == stored(model)


def test_modules_around_transformers_models():
    class Wrapped(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = llama().eval()

    assert estimate(Wrapped()).parts == estimate(llama().eval()).parts


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else self.one(x)


def test_what_is_refused():
    model = llama()
    with pytest.raises(ll.ConfigError) as caught:
        ll.estimate_memory(
            model, {"r": 4}, "nf5", "adamz", 0, 2.5, "dp", 0, precision="8-true", card="a fast one"
        )  # fmt: skip
    said = str(caught.value)
    for words in (
        "9 problems",
        "config must be a LoRAConfig, or None for training the whole model, got dict",
        "optimizer must be one of adamw, ",
        "Did you mean 'adam', 'adamw'",
        "batch_size must be a positive integer, got 0",
        "seq_len must be a positive integer, got 2.5",
        "devices must be a positive integer, got 0",
        "strategy must be ",
        "precision must be ",
        "card must be a size in GiB (24, '24GiB') or one of t4, ",
        "mode must be ",
    ):
        assert words in said, words
    with pytest.raises(ll.ConfigError, match="model must be an nn.Module, got str"):
        ll.estimate_memory("llama", CONFIG)
    with pytest.raises(ll.ConfigError, match="BertForSequenceClassification has 512 positions, got 1024"):
        ll.estimate_memory(bert(), CONFIG)
    with pytest.raises(ll.TargetError, match="'q_prj'"):
        estimate(model, ll.LoRAConfig(target_modules=["q_prj"]))
    with pytest.raises(ll.ConfigError, match="what Looks is given is not known: give example_inputs"):
        ll.estimate_memory(Looks(), CONFIG)
    with pytest.raises(ll.UnsupportedError, match="a forward that looks at values can't be followed"):
        ll.estimate_memory(Looks(), ll.LoRAConfig(target_modules=["one", "two"]), example_inputs=torch.ones(2, 8))
    with pytest.raises(ll.ConfigError, match="attn_implementation='magic'"):
        estimate(model, attn_implementation="magic")
    ll.inject(model, CONFIG, "korean")
    with pytest.raises(ll.ConfigError, match=r"has adapters already \(korean\): .*ll.eject"):
        estimate(model)


def test_cards():
    assert {name: card_bytes(name) for name in CARDS} == {name: size << 30 for name, size in CARDS.items()}
    assert card_bytes("24GiB") == card_bytes("24 GB") == card_bytes(24) == card_bytes("RTX 4090") == 24 << 30
    assert [card_bytes(odd) for odd in (0, -1, True, "", "gib", None)] == [None] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
@pytest.mark.parametrize("again", [False, True])
def test_on_a_gpu(quantization, again):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    model, config = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval(), ll.LoRAConfig(r=16)
    run = {"batch_size": 4, "seq_len": 512, "precision": "bf16-true", "gradient_checkpointing": again}
    found = ll.estimate_memory(model, config, quantization, **run)
    model.to("cuda", torch.bfloat16)
    ll.inject(model, config)
    if quantization is not None:
        ll.quantize(model, quantization)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = {"input_ids": torch.zeros(4, 512, dtype=torch.long, device="cuda")}
    batch["labels"] = batch["input_ids"]
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss
    assert found.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
