"""QLoRA and QDoRA: steps, texts and merges with a packed base are those with the unpacked one."""

import copy

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.quantization import dense, is_quantized
from lightning_lora.quantize import dequantize_
from tests.gpu import DEVICE, MARKS
from tests.gpu.packed import VARIANTS, Net, inputs, made, outcome, variants
from tests.gpu.sites import assert_near
from tests.helpers.families import FAMILIES

# bitsandbytes says that it takes its slower product where rows end within a block of scales
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")]
DTYPES = {"float32": 1e-5, "bfloat16": 1e-2}  # how near a step is to the same with a dense weight
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# int8 goes the plain way, on which layers with one input draw masks of their own
steps = pytest.mark.parametrize(
    ("mode", "options"),
    [*((m, o) for m in ("nf4-dq", "nf4", "fp4") for o in VARIANTS.values()), ("int8", {}), ("int8", VARIANTS["dora"])],
    ids=[*(f"{m}-{o}" for m in ("nf4-dq", "nf4", "fp4") for o in VARIANTS), "int8-lora", "int8-dora"],
)


@dtypes
@steps
def test_a_step_is_that_with_the_unpacked_weight(mode, options, dtype):
    """Outputs and all gradients; in 8 bits the input is rounded too."""
    kind = getattr(torch, dtype)
    model, x = made(mode, kind, **options), inputs(4, 20, 128, dtype=kind)
    unpacked = copy.deepcopy(model)
    dequantize_(unpacked)
    assert not any(is_quantized(layer) for layer in unpacked.children())
    found, wanted = outcome(model, x), outcome(unpacked, x)
    tolerance = 0.1 if mode == "int8" else 5 * DTYPES[dtype]
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        assert_near(value, wanted[name], tolerance, name)


@steps
def test_under_autocast(mode, options):
    model, x = made(mode, **options), inputs(4, 20, 128)
    unpacked = copy.deepcopy(model)
    dequantize_(unpacked)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, wanted = outcome(model, x), outcome(unpacked, x)
    assert found["out"].dtype == torch.bfloat16
    for name, value in found.items():
        assert_near(value, wanted[name], 0.15 if mode == "int8" else 0.05, name)


@dtypes
@pytest.mark.parametrize("mode", ["nf4-dq", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_one_token_is_as_it_is_among_many(mode, options, dtype):
    """Where no gradients are asked for, products are by kernels of bitsandbytes: others for few rows than for many."""
    kind = getattr(torch, dtype)
    model, x = made(mode, kind, **options).eval(), inputs(3, 40, 128, dtype=kind)
    tolerance = 0.05 if mode == "int8" else 3 * DTYPES[dtype]
    wanted = model(x).detach()
    with torch.inference_mode():
        many, few = model(x), model(x[:, :3])
        one = torch.stack([model(x[:1, i : i + 1])[0, 0] for i in range(5)])
    assert_near(many, wanted, tolerance)
    assert_near(few, wanted[:, :3], tolerance)
    assert_near(one, wanted[0, :5], tolerance)


@variants
@pytest.mark.parametrize("mode", ["nf4-dq", "nf4", "fp4", "int8"])
def test_merged_into_a_packed_base_and_back(mode, options):
    model, x = made(mode, **options).eval(), inputs(4, 128)
    with torch.no_grad():
        wanted = model(x)
        exact = {name: each.lora["default"].merged(dense(each)) for name, each in model.named_children()}
        keys = {key: value.clone() for key, value in model.state_dict().items()}
        report = ll.merge(model)
        assert all(layer.error > 0 for layer in report.layers.values())
        for name, layer in model.named_children():  # packed again
            assert is_quantized(layer)
            assert_near(dense(layer), exact[name], 0.02 if mode == "int8" else 0.15, name)
        ll.unmerge(model)
        assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(x), wanted)
        ll.merge_and_unload(model)
        assert all(type(layer) is nn.Linear and layer.weight.device.type == DEVICE for layer in model.children())
        assert_near(model(x), wanted, 0.03 if mode == "int8" else 1e-4)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_of_packed_bases(mode, start):
    """What is left of the weight is packed, and with the adapter the model is nearer to what it was than without."""
    model, x = Net().to(DEVICE), inputs(4, 128)
    wanted = model(x).detach()
    ll.inject(model, ll.LoRAConfig(r=8, init_lora_weights=start, target_modules="all-linear", modules_to_save=None))
    ll.quantize(model, mode)
    assert_near(model(x), wanted, 0.3)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_a_language_model_learns(mode):
    family = FAMILIES["llama"]
    model, batch = family.make().to(DEVICE), family.batch(None)
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    ll.inject(model, ll.LoRAConfig(r=8, lora_dropout=0.1))
    ll.quantize(model, mode)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    ll.attach_optimizer(model, optimizer)
    losses = []
    for _ in range(8):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    tokens = model.eval().generate(batch["input_ids"][:1, :3], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)
