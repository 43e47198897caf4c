"""Ctrl-C, while a model is changed: it is what it was before."""

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.composing import compose
from lightning_lora.injection import inject
from lightning_lora.loading import placement
from lightning_lora.merging import merge
from lightning_lora.switching import contexts
from tests.helpers.layers import randomise

X = torch.randn(5, 8)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    for name in ("default", "other"):
        ll.inject(model, ll.LoRAConfig(r=2), adapter_name=name)
    randomise(model)
    return model


ACTS = {
    "inject": ((inject, "initialise"), lambda model, folder: ll.inject(model, ll.LoRAConfig(r=3), adapter_name="new")),
    "attach": ((inject, "attach"), lambda model, folder: ll.inject(model, ll.LoRAConfig(r=3), adapter_name="new")),
    "load": ((placement, "_fill"), lambda model, folder: ll.load_adapter(model, folder, adapter_name="new")),
    "merge": ((merge, "_merge_layer"), lambda model, folder: ll.merge(model)),
    "combine": (
        (compose, "attach"),
        lambda model, folder: ll.combine_adapters(model, {"default": 0.7, "other": 0.3}, "new"),
    ),
}


@pytest.mark.parametrize(("where", "act"), ACTS.values(), ids=ACTS)
def test_nothing_is_changed_by_what_is_broken_off(model, where, act, tmp_path, monkeypatch):
    ll.save_adapter(model, tmp_path / "a", adapter_name="other")
    y, state, names = model(X), model.state_dict(), [name for name, _ in model.named_parameters()]
    original, calls = getattr(*where), []

    def interrupted(*args, **kwargs):
        if calls or where[1] in ("initialise", "_fill"):
            raise KeyboardInterrupt
        calls.append(original(*args, **kwargs))
        return calls[-1]

    with monkeypatch.context() as patched:
        patched.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            act(model, tmp_path / "a")
    assert torch.equal(model(X), y)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    act(model, tmp_path / "a")


def enter_disabled(model):
    with ll.disable_adapters(model):
        pass


def enter_mixed(model):
    with ll.mixed_batch(model, ["default", None, "other", "default", "other"]):
        pass


@pytest.mark.parametrize(
    ("where", "enter"),
    [
        ((merge.Originals, "swap"), enter_disabled),
        ((contexts, "put_in_place"), enter_disabled),
        ((contexts, "Context"), enter_disabled),
        ((contexts, "Mixture"), enter_mixed),
        ((contexts, "Context"), enter_mixed),
    ],
    ids=["swap", "in_place", "suspended", "mixture", "suspended-mixed"],
)
def test_contexts_that_are_broken_off_as_they_begin(model, where, enter, monkeypatch):
    if enter is enter_mixed:
        ll.set_adapter(model, {"default": 0.7, "other": -0.3})
    else:
        ll.merge(model)
    y = model(X)
    original, calls = getattr(*where), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if where[1] == "put_in_place" else 2):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            enter(model)
    assert torch.equal(model(X), y)
    enter(model)
    assert torch.equal(model(X), y)
