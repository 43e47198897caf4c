"""Adapters on models: layers with one input, checkpointed blocks, autocast, second derivatives, generation."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.layers import activation
from tests.gpu import DEVICE, MARKS
from tests.gpu.language import VARIANTS, llama, outcome, same, same_on_the_whole, variants
from tests.gpu.sites import TOLERANCE, assert_near
from tests.helpers.layers import randomise

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_layers_with_one_input_are_as_each_by_itself(monkeypatch, options, dtype):
    ranks = {"k_proj": 3} if dtype == torch.float64 else {}  # a rank more is some kernels more to compile
    model, batch = llama(dtype, rank_pattern=ranks, alpha_pattern={"q_proj": 7}, **options)
    sizes, real = [], activation.fused_linears
    monkeypatch.setattr(activation, "fused_linears", lambda x, sites, p: sizes.append(len(sites)) or real(x, sites, p))
    together = outcome(model, batch)
    assert sizes == [1, 1, 1, 1, 2, 1, 3, 1, 2, 1]  # what needs no gradient itself is not shared
    monkeypatch.setattr(activation.LoRALinear, "lora_alone", lambda *_: None)
    check, tolerance = (same, 1e-10) if dtype == torch.float64 else (same_on_the_whole, 0.05)
    check(together, outcome(model, batch), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_small_steps(monkeypatch, options, dtype):
    """Layers by themselves take operations that autograd knows, which come to the same."""
    model, batch = llama(dtype, **options)
    wanted, taken, real = outcome(model, batch), [], activation.linear_by_operations
    monkeypatch.setattr(activation, "starts_count", lambda x, weight: True)
    monkeypatch.setattr(activation, "linear_by_operations", lambda *args: taken.append(1) or real(*args))
    found = outcome(model, batch)
    assert len(taken) == 7  # o_proj and down_proj, whose inputs no other layer has, and the first block's q, k and v
    check, tolerance = (same, 1e-10) if dtype == torch.float64 else (same_on_the_whole, 0.05)
    check(found, wanted, tolerance)


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
