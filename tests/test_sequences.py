"""Whatever is done to a model with adapters, in whatever order: it computes what the equations say."""

import copy
import io
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from lightning_lora.layers import lora_layers

NAMES = ("a", "b", "c", "d")
TARGETS = ("table", "first", "gate", "up", "down", "line")
X = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0, 3, 0, 2, 10]])
weights = st.sampled_from((1.0, 0.5, -1.25, 2.0))


class Model(nn.Module):
    """A layer of each kind. Its forward calls two linears with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.gate = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.up, self.down = Conv1D(10, 8), nn.Linear(10, 8)
        self.line, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = torch.sigmoid(self.gate(x)) * self.first(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.line(x.transpose(1, 2))).transpose(1, 2).contiguous())


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in)."""
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1)


class Adapters(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.plain = Model().double().requires_grad_(False)
        self.model = copy.deepcopy(self.plain)
        self.changes: dict[str, dict[str, Tensor]] = {}  # of adapters, by layer: what it adds to the matrix
        self.heads: dict[str, dict[str, Tensor]] = {}  # of those that brought one
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] | None = None
        self.drawn = 0

    # What is done

    @precondition(lambda self: self.merged is None and len(self.changes) < len(NAMES))
    @rule(
        r=st.integers(1, 3),
        use_dora=st.booleans(),
        use_rslora=st.booleans(),
        init=st.sampled_from(("kaiming", "pissa", "olora", "orthogonal")),
        modules=st.sets(st.sampled_from(TARGETS), min_size=1),
    )
    def add(self, r, use_dora, use_rslora, init, modules):
        name = next(name for name in NAMES if name not in self.changes)
        config = ll.LoRAConfig(
            r=r,
            lora_alpha=3,
            use_dora=use_dora,
            use_rslora=use_rslora,
            init_lora_weights=init,
            target_modules=sorted(modules),
            modules_to_save=None,
        )
        ll.inject(self.model, config, name)
        self.written(name)
        self.active[name] = 1.0

    @precondition(lambda self: self.merged is None and len(self.changes) < len(NAMES))
    @rule(r=st.integers(1, 3), use_dora=st.booleans())
    def load_with_a_head(self, r, use_dora):
        name = next(name for name in NAMES if name not in self.changes)
        config = ll.LoRAConfig(
            r=r, lora_alpha=3, use_dora=use_dora, target_modules=["first", "up"], modules_to_save=["head"]
        )
        alone, mine = copy.deepcopy(self.plain), self.model
        ll.inject(alone, config, name)
        self.model = alone
        self.written(name)
        with tempfile.TemporaryDirectory() as folder:
            ll.save_adapter(alone, Path(folder) / "adapter", name)
            self.model = mine
            ll.load_adapter(self.model, Path(folder) / "adapter")
        self.heads[name] = copy.deepcopy(alone.head.state_dict())
        if len(self.changes) == 1:
            self.active = {name: 1.0}

    @precondition(lambda self: self.changes)
    @rule(data=st.data())
    def switch(self, data):
        wanted = data.draw(st.dictionaries(st.sampled_from(sorted(self.changes)), weights, min_size=1))
        rivals = len(self.heads.keys() & wanted.keys()) > 1
        if self.merged is not None or rivals:
            with pytest.raises(ll.ConfigError, match="unmerge" if self.merged is not None else "both train head"):
                ll.set_adapter(self.model, wanted)
            return
        ll.set_adapter(self.model, wanted)
        self.active = wanted

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def train(self, data):
        """Values change as an optimizer changes them, that may be attached."""
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.AdamW(trained, lr=0.02, fused=data.draw(st.booleans()))
        handle = ll.attach_optimizer(self.model, optimizer)
        for _ in range(2):
            self.model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name in self.active:
            self.noted(name)
            if name in self.heads:
                self.heads[name] = copy.deepcopy(self.model.head.state_dict())
        self.right()
        handle.remove()

    @precondition(lambda self: self.active and self.merged is None)
    @rule()
    def merge(self):
        ll.merge(self.model)
        self.merged = dict(self.active)

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def merge_by_name(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.changes)), min_size=1, unique=True))
        if len(self.heads.keys() & names) > 1:
            with pytest.raises(ll.ConfigError, match="both train head"):
                ll.merge(self.model, names)
            return
        ll.merge(self.model, names)
        self.merged = {name: self.active.get(name, 1.0) for name in names}

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        ll.unmerge(self.model)
        self.merged = None

    @precondition(lambda self: self.changes and self.merged is None and len(self.changes) < len(NAMES))
    @rule(data=st.data())
    def combine(self, data):
        wanted = data.draw(st.dictionaries(st.sampled_from(sorted(self.changes)), weights, min_size=1))
        name = next(name for name in NAMES if name not in self.changes)
        if len(headed := [other for other in wanted if other in self.heads]) > 1:
            with pytest.raises(ll.ConfigError, match="both train head"):
                ll.combine_adapters(self.model, wanted, name, "svd", 100)
            return
        ll.combine_adapters(self.model, wanted, name, "svd", 100)
        if headed:
            self.heads[name] = self.heads[headed[0]]
        added: dict[str, Tensor] = {}
        for other, weight in wanted.items():
            for layer, change in self.changes[other].items():
                added[layer] = added.get(layer, 0) + weight * change
        self.changes[name] = added

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def make_lora(self, data):
        ll.to_lora(self.model, 100, data.draw(st.sampled_from(sorted(self.changes))))

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from(sorted(self.changes)))
        ll.truncate(self.model, data.draw(st.integers(1, 4)), adapter_name=name)
        self.noted(name)

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.changes)))
        ll.delete_adapter(self.model, name)
        for known in (self.changes, self.active, self.heads):
            known.pop(name, None)

    @precondition(lambda self: self.changes and self.merged is None)
    @rule()
    def eject(self):
        ll.eject(self.model)
        self.changes, self.active, self.heads = {}, {}, {}
        assert type(self.model.first) is nn.Linear
        assert [*self.model.state_dict()] == [*self.plain.state_dict()]

    @precondition(lambda self: self.changes and self.merged is None)
    @rule(data=st.data())
    def save_and_load(self, data):
        """Under its own name, or under a new one, or into a model of its own."""
        name = data.draw(st.sampled_from(sorted(self.changes)))
        new = data.draw(st.sampled_from(NAMES))
        if new in self.changes and new != name:
            return
        with tempfile.TemporaryDirectory() as folder:
            ll.save_adapter(self.model, Path(folder) / "adapter", name)
            other = copy.deepcopy(self.plain)
            ll.load_adapter(other, Path(folder) / "adapter")
            torch.testing.assert_close(other(X), self.expected({name: 1.0}), rtol=1e-9, atol=1e-9)
            ll.load_adapter(self.model, Path(folder) / "adapter", new)
        if new != name:
            self.changes[new] = self.changes[name]
            if name in self.heads:
                self.heads[new] = self.heads[name]
            if len(self.changes) == 1:
                self.active = {new: 1.0}

    @rule(pickled=st.booleans())
    def copied(self, pickled):
        if pickled:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)
        else:
            self.model = copy.deepcopy(self.model)

    @rule(data=st.data())
    def mixed(self, data):
        if not self.changes or self.merged is not None:
            return
        plain = sorted(self.changes.keys() - self.heads.keys())
        names = data.draw(st.lists(st.sampled_from([None, *plain]), min_size=3, max_size=3))
        with torch.no_grad(), ll.mixed_batch(self.model, names):
            out = self.model(X)
        for i, name in enumerate(names):
            wanted = self.expected({} if name is None else {name: 1.0})[i]
            torch.testing.assert_close(out[i], wanted, rtol=1e-9, atol=1e-9)

    # What has to hold

    @invariant()
    def right(self):
        if not hasattr(self, "model"):
            return
        wanted = self.expected(self.active if self.merged is None else self.merged)
        self.model.train()
        torch.testing.assert_close(self.model(X), wanted, rtol=1e-9, atol=1e-9)
        with torch.no_grad(), ll.dora_caching(self.model.eval()):
            for _ in range(2):
                torch.testing.assert_close(self.model(X), wanted, rtol=1e-9, atol=1e-9)
        if self.changes:
            with ll.disable_adapters(self.model), torch.no_grad():
                assert torch.equal(self.model(X), self.plain(X))
        trained = {key.split(".")[2] for key, p in self.model.named_parameters() if p.requires_grad and ".lora." in key}
        assert trained == set(self.active)
        assert self.model.head.weight.requires_grad == bool(self.heads.keys() & self.active.keys())

    # The equations

    def written(self, name: str) -> None:
        """Draws values for an adapter."""
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        for _, layer in lora_layers(self.model):
            if name in layer.lora:
                for parameter in layer.lora[name].parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    with torch.no_grad():
                        parameter.add_(noise, alpha=0.2)
        self.noted(name)

    def noted(self, name: str) -> None:
        """What an adapter adds to each matrix, from its parameters."""
        self.changes[name] = {}
        for key, layer in lora_layers(self.model):
            if name in layer.lora:
                plain, adapter = self.plain.get_submodule(key), layer.lora[name]
                W = as_matrix(plain, plain.weight.detach())
                A, B = adapter.A.detach(), adapter.B.detach()
                total = W + adapter.scaling * (
                    B @ A - (0 if adapter.start_A is None else adapter.start_B @ adapter.start_A)
                )
                if hasattr(adapter, "magnitude"):
                    total = total * (adapter.magnitude.detach() / total.norm(dim=1))[:, None]
                self.changes[name][key] = total - W

    @torch.no_grad()
    def expected(self, active: dict[str, float]) -> Tensor:
        model = copy.deepcopy(self.plain)
        for owner in active:
            if owner in self.heads:
                model.head.load_state_dict(self.heads[owner])
        for name, weight in active.items():
            for key, change in self.changes[name].items():
                layer = model.get_submodule(key)
                as_matrix(layer, layer.weight).add_(change, alpha=weight)
        return model(X)


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    deadline=None, max_examples=30, stateful_step_count=20, derandomize=True, database=None
)
