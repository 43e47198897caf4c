"""The loss through a head without the logits of all tokens: against F.cross_entropy, for every kind of head."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora as ll
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.ops import cross_entropy
from tests.benchmarks.cross_entropy import Allocations

V, D = 37, 6
REDUCTIONS = ["mean", "sum", "none"]


def case(tokens=(3, 7), dtype=torch.float64, ignored=5, trained="", spread=1.0):
    """hidden, weight, bias, labels; ``trained`` names which of the first three take gradients."""
    tensors = {
        "hidden": torch.randn(*tokens, D, dtype=dtype),
        "weight": spread * torch.randn(V, D, dtype=dtype),
        "bias": torch.randn(V, dtype=dtype),
    }
    labels = torch.randint(V, tokens)
    if ignored:
        labels.view(-1)[torch.randperm(labels.numel())[:ignored]] = -100
    for name in trained.split():
        tensors[name].requires_grad_()
    return *tensors.values(), labels


def expected(hidden, weight, labels, bias=None, **options):
    """F.cross_entropy on all logits."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), **options)
    return loss.view(labels.shape) if options.get("reduction") == "none" else loss


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk_size", [1, 4, 16, None])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias", "weight", "hidden bias", "bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equal_to_torch(reduction, smoothing, trained, chunk_size):
    hidden, weight, bias, labels = case(trained=trained)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss = ll.linear_cross_entropy(hidden, weight, labels, bias, chunk_size=chunk_size, **options)
    reference = expected(hidden, weight, labels, bias, **options)
    close(loss, reference)
    upstream = 1.7 * torch.randn_like(loss)
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
    for found, wanted in zip(*(torch.autograd.grad(one, inputs, upstream) for one in (loss, reference)), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(reduction, smoothing):
    hidden, weight, bias, labels = case((2, 4), ignored=2, trained="hidden weight bias")
    options = {"reduction": reduction, "label_smoothing": smoothing, "chunk_size": 3}
    assert torch.autograd.gradcheck(
        lambda h, w, b: ll.linear_cross_entropy(h, w, labels, b, **options), (hidden, weight, bias)
    )


@pytest.mark.parametrize("tokens", [(7,), (2, 7), (2, 3, 4)])
def test_a_shift_is_that_of_transformers(tokens):
    hidden, weight, _, labels = case(tokens, ignored=2, trained="hidden")
    loss = ll.linear_cross_entropy(hidden, weight, labels, shift=True)
    reference = expected(hidden[..., :-1, :], weight, labels[..., 1:])
    close(loss, reference)
    close(*(torch.autograd.grad(one, hidden)[0] for one in (loss, reference)))
    each = ll.linear_cross_entropy(hidden, weight, labels, shift=True, reduction="none")
    close(each[..., :-1], expected(hidden[..., :-1, :], weight, labels[..., 1:], reduction="none"))
    assert not each[..., -1].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("tokens", [(2, 3), (0,)])
def test_no_token_counts(tokens, trained, reduction, smoothing):
    hidden, weight, bias, labels = case(tokens, ignored=6, trained=trained)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    for head in (weight, functools.partial(F.linear, weight=weight, bias=bias)):
        loss = ll.linear_cross_entropy(hidden, head, labels, bias if head is weight else None, **options)
        torch.testing.assert_close(loss, expected(hidden, weight, labels, bias, **options), equal_nan=True)
        inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss.sum(), inputs))


def test_another_ignore_index_and_a_single_token():
    hidden, weight, _, labels = case(ignored=0)
    labels[0, :3] = 5
    close(
        ll.linear_cross_entropy(hidden, weight, labels, ignore_index=5),
        expected(hidden, weight, labels, ignore_index=5),
    )
    close(
        ll.linear_cross_entropy(hidden[1, 2], weight, labels[1, 2]),
        F.cross_entropy(weight @ hidden[1, 2], labels[1, 2]),
    )
    byte = labels.to(torch.uint8)
    assert torch.equal(ll.linear_cross_entropy(hidden, weight, byte), ll.linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_no_less_exact_than_torch_in_16_bits(dtype, trained):
    """The softmax is taken in float32. Errors are those against float64, of all entries together."""
    hidden, weight, bias, labels = case((8, 64), dtype, ignored=100, trained=trained)
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = torch.autograd.grad(expected(exact[0], exact[1], labels, exact[2]), exact)
    found = {}
    for name, function in (("ours", ll.linear_cross_entropy), ("torch", expected)):
        loss = function(hidden, weight, labels, bias)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss * 1024, inputs)
        assert [g.dtype for g in gradients] == [dtype] * len(inputs)
        found[name] = [
            ((g.double() / 1024 - t).norm() / t.norm()).item() for g, t in zip(gradients, truth, strict=False)
        ]
    for ours, torchs in zip(found["ours"], found["torch"], strict=True):
        assert ours <= 1.4 * torchs


def test_float32_sums_of_the_weights_gradient_in_bfloat16():
    """Not rounded to bfloat16 once for each piece."""
    hidden, weight, _, labels = case((1, 512), torch.bfloat16, ignored=0, trained="weight")
    (whole,) = torch.autograd.grad(ll.linear_cross_entropy(hidden, weight, labels), weight)
    (pieces,) = torch.autograd.grad(ll.linear_cross_entropy(hidden, weight, labels, chunk_size=2), weight)
    torch.testing.assert_close(pieces, whole, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_float16_keeps_gradients_of_tokens_that_are_almost_learnt(scale):
    """Losses of 1e-6 and less, whose gradients float16 can't hold; GradScaler scales them up behind the forward pass."""
    hidden, weight, _, labels = case((64,), torch.float16, ignored=0)
    weight *= 0.05
    labels = torch.arange(64) % V
    hidden = (hidden + 300 * F.normalize(weight[labels].float(), dim=1) / math.sqrt(D)).half().requires_grad_()
    each = ll.linear_cross_entropy(hidden, weight, labels, reduction="none")
    exact = hidden.detach().double().requires_grad_()
    reference = expected(exact, weight.double(), labels)
    (truth,) = torch.autograd.grad(reference, exact)
    (gradient,) = torch.autograd.grad(ll.linear_cross_entropy(hidden, weight, labels) * scale, hidden)
    assert each.min() < 1e-6
    rows = truth.norm(dim=1) * scale > 1e-3  # what float16 can hold
    assert rows.any() or scale == 1
    errors = (gradient.double() - truth * scale)[rows].norm(dim=1) / (truth * scale)[rows].norm(dim=1)
    assert (errors < 0.02).all()


def test_a_grad_scaler():
    hidden, weight, _, labels = case((64,), torch.float32, ignored=0)
    hidden, scaler = nn.Parameter(hidden), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer, before = torch.optim.SGD([hidden], lr=1.0), hidden.detach().clone()
    (truth,) = torch.autograd.grad(expected(hidden, weight, labels), hidden)
    with torch.autocast("cpu", torch.float16):
        loss = ll.linear_cross_entropy(hidden, weight, labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert (before - hidden.detach() - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_autocast(trained, dtype, low):
    """Products as F.linear takes them, the loss in float32 at least, gradients in the dtype of what they are of."""
    hidden, weight, bias, labels = case((4, 16), dtype, trained=trained)
    with torch.autocast("cpu", low):
        loss = ll.linear_cross_entropy(hidden, weight, labels, bias)
        reference = expected(hidden, weight, labels, bias)
        assert loss.dtype == reference.dtype
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
    found, wanted = (torch.autograd.grad(1000 * one, inputs) for one in (loss, reference))
    tolerance = 1e-10 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance)
    for ours, torchs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * torchs.abs().max().item())
    with torch.autocast("cpu", low):  # with mixed dtypes too
        ll.linear_cross_entropy(hidden.detach().to(torch.float32), weight.to(torch.bfloat16), labels)


def test_products_that_are_taken():
    """Two for each piece with a frozen head, none of them in the backward pass; one without gradients."""
    hidden, weight, _, labels = case((40,), ignored=8, trained="hidden")
    with Products() as forward:
        loss = ll.linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    with Products() as backward:
        loss.backward()
    assert (forward.count, backward.count) == (8, 0)  # of 32 tokens
    for context, needs in ((torch.no_grad, True), (torch.inference_mode, True), (torch.enable_grad, False)):
        hidden.requires_grad_(needs)
        with context(), Products() as forward:
            loss = ll.linear_cross_entropy(hidden, weight, labels, chunk_size=8)
        assert forward.count == 4
        assert not loss.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_bytes(trained, dtype, reduction):
    """Nothing has tokens x vocabulary elements, and a gradient of hidden is all that is held for a frozen head."""
    tokens, vocabulary, width, chunk = 512, 2048, 16, 32
    hidden, weight = torch.randn(2, tokens // 2, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    labels = torch.randint(vocabulary, (2, tokens // 2))
    hidden.requires_grad_()
    weight.requires_grad_("weight" in trained)
    with Allocations(hidden, weight, labels) as allocations:
        loss = ll.linear_cross_entropy(hidden, weight, labels, shift=True, reduction=reduction, chunk_size=chunk)
        held = allocations.live
        loss.sum().backward()
    assert allocations.largest <= chunk * vocabulary
    small = 64 * tokens  # labels, losses, positions: some numbers for each token
    assert held <= hidden.nbytes * (2 if weight.requires_grad else 1) + small
    if not weight.requires_grad:
        assert allocations.peak <= 6 * chunk * vocabulary + 4 * hidden.nbytes + small


def test_what_is_held_for_a_function_is_its_input():
    hidden, weight, _, labels = case((256,), torch.float32, trained="hidden")
    weight = weight.repeat(50, 1)
    head = functools.partial(F.linear, weight=weight)
    with Allocations(hidden, weight, labels) as allocations:
        loss = ll.linear_cross_entropy(hidden, head, labels, chunk_size=16)
        held = allocations.live
        loss.backward()
    assert allocations.largest <= 16 * 50 * V
    assert held <= hidden.nbytes + 64 * len(labels)


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 5])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_at_a_time(vocabulary, device):
    tokens = cross_entropy._tokens_at_a_time(vocabulary, torch.device(device))
    assert tokens % 64 == 0
    assert tokens >= 256
    assert tokens * vocabulary <= max(256 * vocabulary, 1 << (22 if device == "cpu" else 26))


def test_backward_twice():
    hidden, weight, _, labels = case(trained="hidden weight")
    loss = ll.linear_cross_entropy(hidden, weight, labels)
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with pytest.raises(UnsupportedError, match="has no gradient itself"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled(reduction):
    hidden, weight, bias, labels = case(trained="hidden weight")
    options = {"reduction": reduction, "label_smoothing": 0.1, "shift": True}
    lm_head = nn.Linear(D, V, dtype=torch.float64)

    def both(hidden, weight, bias, labels):
        first = ll.linear_cross_entropy(hidden, weight, labels, bias, **options)
        return first + ll.linear_cross_entropy(hidden, lm_head, labels, **options)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, weight, bias, labels)
    wanted = both(hidden, weight, bias, labels)
    close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in (found, wanted)), strict=True):
        close(a, b)


def test_torch_func():
    hidden, weight, _, labels = case(ignored=3)

    def loss(hidden, labels):
        return ll.linear_cross_entropy(hidden, weight, labels, shift=True)

    close(
        torch.func.grad(loss)(hidden, labels),
        torch.func.grad(lambda h: expected(h[:, :-1], weight, labels[:, 1:]))(hidden),
    )
    each = torch.func.vmap(torch.func.grad(loss))(hidden, labels)
    for row, tokens, found in zip(hidden, labels, each, strict=True):
        (wanted,) = torch.autograd.grad(loss(row.requires_grad_(), tokens), row)
        close(found, wanted)


def adapted(head, **options):
    net = nn.Sequential(head)
    ll.inject(net, ll.LoRAConfig(r=3, lora_alpha=7, target_modules=["0"], modules_to_save=None, **options))
    nn.init.normal_(head.lora["default"].B)
    return net[0]


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.1 * super().forward(x)


def hooked(head):
    head.register_forward_hook(lambda module, args, out: 2 * out)
    return head


def replaced(head):
    head.forward = lambda x: F.linear(x, head.weight, head.bias).tanh()
    return head


def active(head):
    net = nn.Sequential(head)
    ll.set_adapter(net, {"default": 0.5})
    return head


def linear(cls=nn.Linear):
    return cls(D, V, dtype=torch.float64)


HEADS = {
    "a linear": linear,
    "a frozen linear": lambda: linear().requires_grad_(False),
    "LoRA": lambda: adapted(linear()),
    "LoRA of half weight": lambda: active(adapted(linear())),
    "LoRA with a part of the weight": lambda: adapted(linear(), init_lora_weights="pissa"),
    "DoRA": lambda: adapted(linear(), use_dora=True),
    "a class of one's own": lambda: linear(Scaled),
    "LoRA on such": lambda: adapted(linear(Scaled)),
    "a hook": lambda: hooked(linear()),
    "another forward": lambda: replaced(linear()),
    "a parametrization": lambda: weight_norm(linear()),
    "two layers": lambda: nn.Sequential(
        nn.Linear(D, 4, dtype=torch.float64), nn.GELU(), nn.Linear(4, V, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_any_layer(name, reduction):
    head = HEADS[name]()
    hidden, _, _, labels = case(trained="hidden")
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    loss = ll.linear_cross_entropy(hidden, head, labels, reduction=reduction, label_smoothing=0.1, chunk_size=4)
    logits = head(hidden).flatten(0, 1)
    reference = F.cross_entropy(logits, labels.flatten(), reduction=reduction, label_smoothing=0.1)
    close(loss.flatten(), reference.flatten())
    upstream = torch.randn_like(loss)
    found = torch.autograd.grad(loss, inputs, upstream)
    for a, b in zip(found, torch.autograd.grad(reference, inputs, upstream.view(reference.shape)), strict=True):
        close(a, b)


def test_a_function_that_caps_logits():
    hidden, weight, _, labels = case(trained="hidden weight")

    def capped(rows):
        return 3 * torch.tanh(F.linear(rows, weight) / 3)

    loss = ll.linear_cross_entropy(hidden, capped, labels, chunk_size=4)
    reference = F.cross_entropy(capped(hidden).flatten(0, 1), labels.flatten())
    close(loss, reference)
    for a, b in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (loss, reference)), strict=True):
        close(a, b)


def test_dropout_on_an_adapted_head_is_the_same_when_logits_are_made_again():
    head = adapted(linear(), lora_dropout=0.5)
    hidden, _, _, labels = case(trained="hidden")
    A, step = head.lora["default"].A, 1e-6
    direction = torch.randn_like(A)

    def loss():
        torch.manual_seed(3)
        return ll.linear_cross_entropy(hidden, head, labels, chunk_size=4)

    (gradient,) = torch.autograd.grad(loss(), A)
    with torch.no_grad():
        ends = []
        for side in (1, -2):
            A += side * step * direction
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")
def test_a_packed_head(mode):
    net = nn.Sequential(nn.Linear(64, 128, bias=False))
    ll.inject(net, ll.LoRAConfig(r=3, target_modules=["0"], modules_to_save=None))
    ll.quantize(net, mode)
    hidden, labels = torch.randn(9, 64, requires_grad=True), torch.randint(128, (9,))
    nn.init.normal_(net[0].lora["default"].B)
    parameters = [hidden, *net[0].lora["default"].parameters()]
    found = torch.autograd.grad(ll.linear_cross_entropy(hidden, net[0], labels), parameters)
    wanted = torch.autograd.grad(F.cross_entropy(net[0](hidden), labels), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes, **options)).double()


@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {}),
        (True, {}),
        (False, {"target_modules": ["q_proj", "lm_head"]}),
        (False, {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "lora_dropout": 0.0}),
        (False, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["frozen head", "tied head", "adapted head", "DoRA on the head", "head trained in full"],
)
def test_a_language_model(tied, config):
    """Instead of ``model(labels=...).loss``: the same loss, and the same gradient of every parameter that is trained."""
    model = llama(tie_word_embeddings=tied)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=12, **{"modules_to_save": None, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    batch = {"input_ids": torch.randint(61, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batch["attention_mask"][0, 8:] = 0
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100  # the prompt
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) == bool(config)
    reference = model(**batch, labels=labels).loss
    wanted = torch.autograd.grad(reference, [*trained.values()])
    hidden = model.model(**batch).last_hidden_state
    loss = ll.linear_cross_entropy(hidden, model.lm_head, labels, shift=True, chunk_size=8)
    found = torch.autograd.grad(loss, [*trained.values()])
    # transformers takes the loss in float32
    torch.testing.assert_close(loss.float(), reference.float(), rtol=1e-6, atol=0)
    exact = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(loss, exact)
    for a, b, c in zip(found, torch.autograd.grad(exact, [*trained.values()]), wanted, strict=True):
        close(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-7)


def test_gradients_accumulate():
    """Micro-batches of other sizes, weighed by their tokens, give the gradient of the batch."""
    model = llama()
    ll.inject(model, ll.LoRAConfig(r=4, modules_to_save=None))
    whole, ids = copy.deepcopy(model), torch.randint(61, (4, 9))
    labels = ids.clone()
    labels[0, :6] = -100
    count = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        hidden = model.model(ids[rows]).last_hidden_state
        part = ll.linear_cross_entropy(hidden, model.lm_head, labels[rows], shift=True, reduction="sum")
        (part / count).backward()
    ll.linear_cross_entropy(whole.model(ids).last_hidden_state, whole.lm_head, labels, shift=True).backward()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        if a.requires_grad:
            close(a.grad, b.grad)


def test_a_sharded_head(tmp_path):
    """A frozen one is gathered; of one that is trained no rank has the gradient."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, bias, labels = case(trained="hidden")
        mesh = init_device_mesh("cpu", (1,))
        head = linear().requires_grad_(False)
        head.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=False)
        head.bias = nn.Parameter(distribute_tensor(bias, mesh, [Shard(0)]), requires_grad=False)
        close(ll.linear_cross_entropy(hidden, head, labels), expected(hidden, weight, labels, bias))
        head.requires_grad_(True)
        with pytest.raises(UnsupportedError, match="trained, and each rank has a part"):
            ll.linear_cross_entropy(hidden, head, labels)
    finally:
        distributed.destroy_process_group()


H, W, B, Y = case()
WRONG = [
    ((H, W[:, :4], Y), {}, "needs a head .vocabulary, 6., got .37, 4.. If a strategy"),
    ((H, W.T, Y), {}, "Give head.T"),
    ((H, W, Y, B[:4]), {}, "needs a bias .37,., got .4,."),
    ((H, W, Y[:, :4]), {}, r"needs labels of shape \(3, 7\), got \(3, 4\)"),
    ((H, W, Y[:, 1:]), {}, "leave the slicing out"),
    ((H, W, Y.double()), {}, "labels must be classes as integers, got torch.float64"),
    ((H.long(), W, Y), {}, "hidden must be a floating-point tensor"),
    ((H.float(), W, Y), {}, "one dtype outside autocast, got torch.float32 and torch.float64"),
    ((H, nn.Linear(D, V).double(), Y, B), {}, "bias goes with a weight"),
    ((H, "lm_head", Y), {}, "got str"),
    ((H[0, 0], W, Y[0, 0]), {"shift": True}, "got a scalar"),
    ((H, W, Y), {"reduction": "average"}, "reduction must be one of"),
    ((H, W, Y), {"label_smoothing": 1.5}, "label_smoothing must be in"),
    ((H, W, Y), {"chunk_size": 0}, "chunk_size must be a number of tokens"),
]


@pytest.mark.parametrize(("args", "options", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(args, options, message):
    with pytest.raises(ConfigError, match=message):
        ll.linear_cross_entropy(*args, **options)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        ll.linear_cross_entropy(H, W.T, Y, reduction="max", chunk_size=-1)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(("wrong", "ignored"), [(V, -100), (-1, -100), (V, 5), (-100, 5)])
def test_a_label_outside_the_vocabulary(wrong, ignored):
    labels = Y.clone()
    labels[labels == -100] = ignored
    labels[1, 2] = wrong
    for head in (W, functools.partial(F.linear, weight=W)):
        with pytest.raises(IndexError, match=f"{wrong} is out of bounds"):
            ll.linear_cross_entropy(H, head, labels, ignore_index=ignored)
