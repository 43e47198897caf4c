"""What can be asserted of training steps beside PEFT: bytes, operations, graphs, and that the peers are what they stand for."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lora as ll
from tests.benchmarks import steps
from tests.benchmarks.peers import PEERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
MOVES = (
    "view",
    "permute",
    "_unsafe_view",
    "new_empty",
    "as_strided",
    "transpose",
    "t.",
    "split",
    "detach",
    "empty",
    "alias",
    "expand",
    "slice",
    "unsafe_view",
    "new_empty",
)


class Count(TorchDispatchMode):
    """Operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(MOVES):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models():
    steps.SIZES["test"] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 1, "vocab_size": 256}
    return steps.Models("test", torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("workload", "least"),
    [
        ("LoRA", 3.5),
        ("LoRA, dropout", 4.3),
        ("DoRA", 4.7),
        ("DoRA, dropout", 4.1),
        ("DoRA, dropout on the low-rank branch", 6.0),
        ("QLoRA", 3.5),
        ("QDoRA", 4.7),
    ],
)
def test_held_bytes(models, workload, least):
    """Of what PEFT holds for its adapters, we hold one part in so many."""
    common, own, packed = steps.WORKLOADS[workload]
    ids = torch.randint(0, 128, (4, 256))
    floor = steps.held_bytes(models.base(packed), ids)
    ours, theirs = (
        steps.held_bytes(model, ids) - floor
        for model in (models.ours(common, own, packed), models.peft(common, packed))
    )
    assert theirs / ours >= least


class Site(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 35), ({"lora_dropout": 0.1}, 42), ({"use_dora": True}, 110), ({"use_dora": True, "lora_dropout": 0.1}, 134)],
)
def test_operations_of_one_query_key_and_value(options, most):
    model, x = Site().bfloat16(), torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    ll.inject(model, ll.LoRAConfig(r=4, target_modules=["q", "k", "v"], modules_to_save=None, **options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ll.attach_optimizer(model.train(), optimizer)
    sum(out.sum() for out in model(x)).backward()
    model.zero_grad()
    x.grad = None
    grads = [torch.ones(64, 32, dtype=torch.bfloat16) for _ in range(3)]
    with Count() as count:
        torch.autograd.backward(model(x), grads)
    assert len(count.names) <= most, count.names


@pytest.mark.parametrize("use_dora", [False, True])
def test_equal_blocks_share_one_graph(models, use_dora):
    """Blocks that are compiled one by one, as is usual, compile once for all, and not again in later steps."""
    torch.compiler.reset()
    model = models.ours({"use_dora": use_dora}, {}, False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ll.attach_optimizer(model, optimizer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.mlp.compile(backend=backend, fullgraph=True)
    ids = torch.randint(0, 128, (2, 64))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) <= (2 if use_dora else 1)  # DoRA: with norms that are there, and before they are


@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_what_peft_computes(name):
    models = steps.Models("tiny", torch.float64, "cpu")
    theirs, peer = models.peft({}, False), models.peer(name, {})
    modules = dict(theirs.base_model.model.named_modules())
    pairs = []
    for path, module in peer.named_modules():
        if isinstance(module, PEERS[name]):
            layer = modules[path]
            for own, other in ((module.A, layer.lora_A["default"].weight), (module.B, layer.lora_B["default"].weight)):
                own.data = other.detach().double().clone()
                other.data = other.data.double()
                pairs.append((own, other))
    ids = torch.randint(0, 128, (2, 16))
    for model in (theirs, peer):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(pairs) == 28
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-10)
