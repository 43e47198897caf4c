"""Blocks that are compiled one by one, as is usual, compile once for all, and not again in later steps."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise

VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "detach", "expand")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("use_dora", [False, True])
def test_equal_blocks_share_one_graph(use_dora):
    torch.compiler.reset()
    family = FAMILIES["llama"]
    model = family.make().train()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, use_dora=use_dora))
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ll.attach_optimizer(model, optimizer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.mlp.compile(backend=backend, fullgraph=True)
    batch = family.batch(model)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


def test_operations_of_a_compiled_step():
    """Beside eight products: A is scaled where it is cast, and a sum can be one with what is behind it."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, target_modules=["0"], modules_to_save=None))
    randomise(model)
    graphs = []

    def noted(graph, inputs):
        names = [node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append(Counter(name for name in names if name not in VIEWS))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    x = torch.randn(4, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    forward, backward = graphs
    assert forward == {"mul": 1, "_to_copy": 2, "mm": 3, "add": 1}
    assert backward == {"mul": 1, "_to_copy": 2, "mm": 5, "add": 1}


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("act", [None, ll.merge, ll.merge_and_unload], ids=["beside", "merged", "unloaded"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_exported_programs(use_dora, act):
    """With as many tokens as there are then."""
    model = FAMILIES["llama"].make().eval()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, use_dora=use_dora, modules_to_save=None))
    randomise(model)
    if act is not None:
        act(model)
    ids = torch.randint(50, (2, 24))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Logits(model), (ids[:, :9].clone(),), dynamic_shapes=({1: tokens},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), Logits(model)(ids))
