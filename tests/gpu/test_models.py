"""Adapters on models: PEFT's numbers, layers with one input, checkpointed blocks, autocast, second derivatives."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.layers import activation
from lightning_lora.layers.siblings import scope
from tests.conformance.test_peft_parity import peft_twin
from tests.gpu import DEVICE, MARKS
from tests.gpu.sites import TOLERANCE, assert_near
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, adapted, randomise

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")]
VARIANTS = {
    "lora": {},
    "lora dropout": {"lora_dropout": 0.25},
    "dora": {"use_dora": True},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.25},
    "dora lora-dropout": {"use_dora": True, "lora_dropout": 0.25, "dora_dropout": "lora"},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def llama(dtype=torch.float64, attention="eager", **options):
    """On the device, with adapters far from their first values, in train mode; and a batch."""
    family = FAMILIES["llama"]
    model, batch = family.make(), family.batch(None)
    model.config._attn_implementation = attention
    ll.inject(model.to(DEVICE, dtype), ll.LoRAConfig(**{"r": 8, "lora_alpha": 24, **options}))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.mul_(0.1)  # updates some times as large as the weights: no more than 16 bits can bear
    return model.train(), {key: value.to(DEVICE) for key, value in batch.items()}


def outcome(model, batch, seed=4):
    """Loss, logits and gradients of the adapters."""
    torch.manual_seed(seed)
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert scope() is None
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_near(value, other[name], tolerance, name)


def same_on_the_whole(one, other, tolerance):
    """Of 16 bits: small gradients behind a softmax may be off by more of themselves."""
    assert_near(one["logits"], other["logits"], tolerance, "logits")
    flat = [torch.cat([v.flatten().double() for k, v in each.items() if ".lora." in k]) for each in (one, other)]
    assert_near(*flat, tolerance, "gradients")


# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "gpt2-conv1d", "embedding", "conv1d", "conv2d-plain"])
def test_equal_to_peft(variant, name):
    """Outputs, gradients and merged weights, of layers of every kind."""
    case = CASES[name]
    model = adapted(case, variant).train()
    twin, x = peft_twin(case, model, variant).to(DEVICE), case.input().to(DEVICE)
    model.to(DEVICE)
    ours, theirs = ([x] if case.ids else [x.clone().requires_grad_()] for _ in range(2))
    out, wanted = model(*ours), twin(*theirs)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    wanted.backward(cotangent)
    for key, parameter in twin.pairs.items():
        got = getattr(model[0].lora["default"], key).grad
        torch.testing.assert_close(got, parameter.grad.view(got.shape), rtol=1e-10, atol=1e-10)
    if not case.ids:
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-10, atol=1e-10)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model[0].weight.data, twin.merge_and_unload()[0].weight.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_language_model_is_equal_to_peft(use_dora):
    model, batch = llama(use_dora=use_dora, target_modules="all-linear")
    base = FAMILIES["llama"].make().to(DEVICE, torch.float64)
    base.config._attn_implementation = "eager"
    config = LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", use_dora=use_dora)
    twin = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    places = {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    theirs = dict(twin.base_model.model.named_parameters())
    pairs = {}
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            layer, key = name.split(".lora.default.")
            pairs[name] = theirs[f"{layer}.{places[key]}"]
            pairs[name].data.copy_(parameter.data.view_as(pairs[name]))
    found = outcome(model, batch)
    out = twin(**batch)
    out.loss.backward()
    torch.testing.assert_close(found["logits"], out.logits, rtol=1e-10, atol=1e-10)
    for name, parameter in pairs.items():
        torch.testing.assert_close(found[name], parameter.grad.view_as(found[name]), rtol=1e-9, atol=1e-10)


@variants
def test_merged_is_the_same(options):
    model, batch = llama(**options)
    model.eval()
    with torch.no_grad():
        wanted = model(**batch).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ll.merge(model)
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
        ll.unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(ll.merge_and_unload(model)(**batch).logits, wanted, rtol=1e-9, atol=1e-9)


# ---- what surrounds the layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_layers_with_one_input_are_as_each_by_itself(monkeypatch, options, dtype):
    ranks = {"k_proj": 3} if dtype == torch.float64 else {}  # a rank more is some kernels more to compile
    model, batch = llama(dtype, rank_pattern=ranks, alpha_pattern={"q_proj": 7}, **options)
    sizes, real = [], activation.fused_linears
    monkeypatch.setattr(activation, "fused_linears", lambda x, sites, p: sizes.append(len(sites)) or real(x, sites, p))
    together = outcome(model, batch)
    assert sizes.count(3) == 2
    monkeypatch.setattr(activation.LoRALinear, "lora_alone", lambda *_: None)
    check, tolerance = (same, 1e-10) if dtype == torch.float64 else (same_on_the_whole, 0.05)
    check(together, outcome(model, batch), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@variants
def test_checkpointed_blocks(options, reentrant, dtype):
    """The masks that are drawn again are the same."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(52, 52), nn.Tanh(), nn.Linear(52, 52)) for _ in range(2)))
    ll.inject(
        blocks.to(DEVICE, dtype),
        ll.LoRAConfig(r=8, lora_alpha=24, modules_to_save=None, target_modules="all-linear", **options),
    )
    randomise(blocks)
    start = torch.randn(3, 37, 52, dtype=dtype, device=DEVICE)
    results = []
    for again in (False, True):
        torch.manual_seed(1)
        x = y = start.clone().requires_grad_()
        for block in blocks.train():
            y = checkpoint(block, y, use_reentrant=reentrant) if again else block(y)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in blocks.parameters() if p.requires_grad)])
        blocks.zero_grad()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
@variants
def test_a_checkpointed_language_model(options, reentrant):
    model, batch = llama(torch.float32, "sdpa", **options)
    wanted = outcome(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(outcome(model, batch), wanted, 1e-5)


@variants
def test_autocast(options):
    """A model in float32 under autocast is near the exact one, and what is trained stays in float32."""
    model, batch = llama(torch.float32, "sdpa", **{**options, "lora_dropout": 0.0})
    exact = outcome(model, batch)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = outcome(model, batch)
    assert all(value.dtype == torch.float32 for name, value in found.items() if ".lora." in name)
    same_on_the_whole(found, exact, 0.05)


@pytest.mark.parametrize(
    ("options", "low"),
    [*((each, torch.bfloat16) for each in VARIANTS.values()), (VARIANTS["dora lora-dropout"], torch.float16)],
    ids=[*VARIANTS, "float16"],
)
def test_autocast_of_one_layer(options, low):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384)).to(DEVICE)
    ll.inject(model, ll.LoRAConfig(r=8, lora_alpha=24, modules_to_save=None, target_modules=["0"], **options))
    randomise(model)
    x = torch.randn(512, 256, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=low):
        out = model.train()(x)
    assert out.dtype == low
    out.float().square().mean().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if not options.get("lora_dropout"):
        assert_near(out, model(x), TOLERANCE[low])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@variants
def test_second_derivatives(options, dtype):
    """A gradient penalty through a whole model."""
    model, batch = llama(dtype, **options)
    leaves = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(2)
    first = torch.autograd.grad(model(**batch).loss, leaves, create_graph=True)
    penalty = sum(g.double().square().sum() for g in first)
    second = torch.autograd.grad(penalty, leaves)
    assert all(g.isfinite().all() for g in second)
    torch.manual_seed(2)
    plain = torch.autograd.grad(model(**batch).loss, leaves)
    for one, other in zip(first, plain, strict=True):
        assert_near(one, other, {torch.bfloat16: 0.1}.get(dtype, 10 * TOLERANCE[dtype]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@variants
def test_the_same_bits_twice(options, dtype):
    model, batch = llama(dtype, **options)
    first, second = outcome(model, batch), outcome(model, batch)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    if options.get("lora_dropout"):
        assert not torch.equal(first["logits"], outcome(model, batch, seed=5)["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@variants
def test_one_token_is_as_it_is_among_many(options, dtype):
    """Without gradients, few tokens go another way than many."""
    model, batch = llama(dtype, "sdpa", **options)
    tokens, tolerance = batch["input_ids"], 1e-5 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        many = model.eval()(tokens).logits
        kept, outs = None, []
        for i in range(tokens.shape[1]):
            step = model(tokens[:, i : i + 1], past_key_values=kept, use_cache=True)
            kept = step.past_key_values
            outs.append(step.logits)
    with torch.enable_grad():
        assert_near(model(tokens).logits, many, tolerance)
    assert_near(torch.cat(outs, 1), many, tolerance)


def test_no_token():
    model, _ = llama(torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert layer(torch.empty(2, 0, 32, device=DEVICE)).shape == (2, 0, 48)
    assert layer(torch.empty(0, 32, device=DEVICE)).shape == (0, 48)
