"""Blocks that run again in the backward pass, in eval mode too."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.patches import Patches
from lightning_lora.recompute import _in_eval_mode_too, checkpoint_activations, let_gradients_through
from tests.helpers.families import FAMILIES


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
