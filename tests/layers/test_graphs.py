"""Blocks that are compiled one by one, as is usual, compile once for all, and not again in later steps."""

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise


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
