"""The loss through a head, in pieces, against F.cross_entropy on all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_lora as ll
from tests.gpu import DEVICE, MARKS, ON_CPU
from tests.gpu.sites import assert_near
from tests.helpers.layers import randomise

pytestmark = MARKS
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(dtype, tokens=(3, 37), columns=52, vocabulary=301, trained=""):
    """hidden, weight, bias and labels, of which some don't count."""
    torch.manual_seed(0)
    tensors = {
        "hidden": torch.randn(*tokens, columns, device=DEVICE),
        "weight": torch.randn(vocabulary, columns, device=DEVICE) / columns**0.5,
        "bias": torch.randn(vocabulary, device=DEVICE),
    }
    labels = torch.randint(vocabulary, tokens, device=DEVICE)
    labels.view(-1)[::5] = -100
    made = {name: t.to(dtype).requires_grad_(name in trained.split()) for name, t in tensors.items()}
    return *made.values(), labels


def exact(hidden, weight, bias, labels, shift=False, **options):
    """In float64, and its leaves."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=-100)
    loss = F.cross_entropy(F.linear(*leaves).flatten(0, -2), labels.flatten(), **options)
    return (loss.view(labels.shape) if options.get("reduction") == "none" else loss), leaves


@dtypes
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias", "weight"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("chunk_size", [16, None])
def test_equal_to_torch(dtype, trained, options, shift, chunk_size):
    hidden, weight, bias, labels = case(dtype, trained=trained)
    loss = ll.linear_cross_entropy(hidden, weight, labels, bias, shift=shift, chunk_size=chunk_size, **options)
    wanted, leaves = exact(hidden, weight, bias, labels, shift, **options)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss, wanted, DTYPES[dtype])
    scale = torch.rand_like(loss) + 0.5
    pairs = [(t, leaf) for t, leaf in zip((hidden, weight, bias), leaves, strict=True) if t.requires_grad]
    found = torch.autograd.grad(loss, [t for t, _ in pairs], scale)
    for one, other in zip(found, torch.autograd.grad(wanted, [t for _, t in pairs], scale.double()), strict=True):
        assert_near(one, other, DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_as_many_tokens_at_a_time_as_by_itself(dtype, trained):
    """A vocabulary with which there are several pieces."""
    hidden, weight, bias, labels = case(dtype, (3, 400), 64, 16_384 if ON_CPU else 131_072, trained=trained)
    loss = ll.linear_cross_entropy(hidden, weight, labels, shift=True)
    wanted, leaves = exact(hidden, weight, torch.zeros_like(bias), labels, True)
    assert_near(loss, wanted, DTYPES[dtype])
    inputs = [t for t in (hidden, weight) if t.requires_grad]
    scale = 2.0**14  # as a gradient scaler has it: of so many classes float16 has no small gradients
    found, true = (torch.autograd.grad(scale * y, x) for y, x in ((loss, inputs), (wanted, leaves[: len(inputs)])))
    for one, other in zip(found, true, strict=True):
        assert_near(one, other, DTYPES[dtype])


@dtypes
def test_no_token_counts(dtype):
    hidden, weight, bias, labels = case(dtype, trained="hidden weight bias")
    for tokens in (0, 3):
        loss = ll.linear_cross_entropy(
            hidden[:tokens], weight, torch.full_like(labels[:tokens], -100), bias, reduction="sum"
        )
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_autocast(low, trained):
    hidden, weight, bias, labels = case(torch.float32, trained=trained)
    with torch.autocast(DEVICE, dtype=low):
        loss = ll.linear_cross_entropy(hidden, weight, labels, bias)
    wanted, leaves = exact(hidden, weight, bias, labels)
    assert_near(loss, wanted, DTYPES[low])
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
    found, true = torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, leaves[: len(inputs)])
    for one, other in zip(found, true, strict=True):
        assert one.dtype == torch.float32
        assert_near(one, other, DTYPES[low])


@pytest.mark.parametrize("kind", ["adapted", "dora", "nf4", "function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_heads(dtype, kind):
    """Those that are called: their logits are made again in the backward pass."""
    hidden, _, _, labels = case(dtype, columns=64, vocabulary=256, trained="hidden")
    model = nn.Sequential(nn.Linear(64, 256, device=DEVICE, dtype=dtype))
    if kind == "nf4":
        ll.quantize(model, "nf4")
    if kind in ("adapted", "dora"):
        ll.inject(model, ll.LoRAConfig(r=8, use_dora=kind == "dora", target_modules=["0"], modules_to_save=None))
        randomise(model)
    head = (lambda h: 3 * torch.tanh(model(h))) if kind == "function" else model[0]
    trained = [hidden, *(p for p in model.parameters() if p.requires_grad)]
    loss = ll.linear_cross_entropy(hidden, head, labels, chunk_size=16)
    wanted = F.cross_entropy(head(hidden).flatten(0, 1).float(), labels.flatten())
    assert_near(loss, wanted, DTYPES[dtype])
    for one, other in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert_near(one, other, 2 * DTYPES[dtype])


def test_the_same_bits_twice():
    hidden, weight, bias, labels = case(torch.bfloat16, trained="hidden weight bias")
    runs = []
    for _ in range(2):
        loss = ll.linear_cross_entropy(hidden, weight, labels, bias)
        runs.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_label_outside_the_vocabulary():
    """An error that says so, and not an assertion on the device, behind which nothing works any more."""
    hidden, weight, bias, labels = case(torch.float32)
    labels[0, 1] = 301
    with pytest.raises(IndexError, match="label 301 is out of bounds of a vocabulary of 301"):
        ll.linear_cross_entropy(hidden, weight, labels, bias)
    assert torch.ones(2, device=DEVICE).sum() == 2
