"""Blocks that run again in the backward pass, in eval mode too."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.patches import Patches
from lightning_lora.recompute import _in_eval_mode_too, checkpoint_activations, keep_adapters, let_gradients_through
from lightning_lora.switching.taking_part import TakingPart
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise


class Block(nn.Module):
    """As older transformers have it: whether it runs again is asked before its hooks, and its forward knows nothing."""

    gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 3), []
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            kwargs.update(use_cache=False, past_key_values=None)
            return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, x, use_cache=True, past_key_values=None):
        self.seen.append((self.training, use_cache, past_key_values))
        return self.linear(x).tanh()


@pytest.mark.parametrize("training", [False, True])
def test_of_older_transformers(training):
    torch.manual_seed(0)
    block, patches, x = Block().train(training), Patches(), torch.randn(2, 3, requires_grad=True)
    _in_eval_mode_too(block, patches)
    block(x, use_cache=True, past_key_values="kept").sum().backward()
    assert block.seen == [(training, False, None)] * 2
    again, x.grad = x.grad, None
    with torch.no_grad():
        block.eval()(x, use_cache=True, past_key_values="kept")
    assert block.seen[2:] == [(False, True, "kept")]
    patches.release()
    block(x).sum().backward()
    assert len(block.seen) == 4
    torch.testing.assert_close(x.grad, again)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_inputs_need_no_gradients(family):
    """Only reentrant checkpoints need those, and they cost a backward pass; the hook for them takes tensors alone."""
    model, patches = FAMILIES[family].make(), Patches()
    ll.inject(model, ll.LoRAConfig(r=2))
    checkpoint_activations(model, patches)
    assert let_gradients_through(model) == {}
    patches.release()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    assert let_gradients_through(model).keys() == {""}


def switched(model, batch, how):
    """The gradients of a forward behind which other adapters are made active."""
    if how == "samples":
        ll.set_adapter(model, ["a", "b"])
        with ll.mixed_batch(model, ["a", "b"]):
            loss = model(**batch).logits.square().mean()
        loss.backward()
    else:
        ll.set_adapter(model, {"a": 0.7, "b": 0.3} if how == "weights" else "a")
        loss = model(**batch).logits.square().mean()
        ll.set_adapter(model, {"a": 0.3, "b": 0.7} if how == "weights" else ["a", "b"])
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if ".lora." in name}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["samples", "weights", "names"])
@pytest.mark.parametrize("asked", ["transformers", "blocks", "user", "user-reentrant"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_blocks_run_again_with_the_adapters_that_they_ran_with(how, asked, use_dora, monkeypatch):
    found = []
    for again in (False, True):
        family = FAMILIES["llama"]
        model = family.make().double().train()
        for name in "ab":
            config = ll.LoRAConfig(r=2, lora_alpha=3, modules_to_save=None, use_dora=use_dora)
            ll.inject(model, config, name)
        randomise(model)
        batch, patches = {"input_ids": torch.arange(12).view(2, 6)}, Patches()
        if asked == "blocks":  # as models of no library
            monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
        if again and asked.startswith("user"):
            model.gradient_checkpointing_enable({"use_reentrant": asked == "user-reentrant"})
            let_gradients_through(model)
            keep_adapters(model, patches)
        elif again:
            checkpoint_activations(model, patches)
        model = copy.deepcopy(model) if asked == "user" else model
        found.append(switched(model, batch, how))
        patches.release()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_an_error_in_a_block_that_is_computed_again_leaves_what_was_active():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        ll.inject(model, ll.LoRAConfig(r=2), name)
    ll.set_adapter(model, "a")
    then = TakingPart(model)
    ll.set_adapter(model, "b")

    def fail():
        assert model[0].lora_active == ("a",)
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        then.run(fail)
    assert model[0].lora_active == ("b",)
