"""DoRA's magnitudes where A and B are still what they were: a branch without a gradient yet, or a rate of 0."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, build, data

X = next(iter(data()))[0]
INITS = ["kaiming", "pissa"]


def magnitudes_alone(module: Lit) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [[p for name, p in named if name.endswith("magnitude") == wanted] for wanted in (True, False)]
    return torch.optim.SGD([{"params": groups[0], "lr": 0.5}, {"params": groups[1], "lr": 0.0}])


def lora(init: str, **options) -> ll.LoRA:
    return ll.LoRA(r=2, lora_alpha=8, use_dora=True, modules_to_save=None, init_lora_weights=init, **options)


def lit() -> Lit:
    return Lit(optimizers_=magnitudes_alone)


def magnitudes(module: Lit) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if n.endswith("magnitude")}


def validated(path: str, init: str, tmp_path) -> Lit:
    trainer(lora(init)).validate(module := lit(), data(), ckpt_path=path, verbose=False)
    return module


def started(path: str, init: str, tmp_path) -> Lit:
    trainer(lora(init, init_from=path)).test(module := lit(), data(), verbose=False)
    return module


def started_from_a_folder(path: str, init: str, tmp_path) -> Lit:
    ll.save_adapter(ll.load_from_checkpoint(Lit, path), tmp_path / "folder")
    return started(str(tmp_path / "folder"), "kaiming", tmp_path)


def loaded(path: str, init: str, tmp_path) -> Lit:
    ll.load_adapter(module := lit(), path)
    trainer(lora(init)).test(module, data(), verbose=False)
    return module


def all_of_it(path: str, init: str, tmp_path) -> Lit:
    """The base too, whose weights come behind the adapters'."""
    whole = ll.load_from_checkpoint(Lit, path).state_dict()
    ll.inject(module := lit(), lora(init).config)
    module.load_state_dict(whole)
    return module


def resumed(path: str, init: str, tmp_path) -> Lit:
    trainer(lora(init), max_epochs=1).fit(module := lit(), data(), ckpt_path=path)
    return module


WAYS = [(way, init) for way in (validated, started, loaded, all_of_it, resumed) for init in INITS]
WAYS.append((started_from_a_folder, "kaiming"))  # PiSSA's is written against the clean base, with other factors


@pytest.mark.parametrize(("way", "init"), WAYS)
def test_they_are_what_was_trained(tmp_path, way: Callable[..., Lit], init):
    run = trainer(lora(init), enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module := lit(), data())
    again = way(run.checkpoint_callback.best_model_path, init, tmp_path)
    before, after = magnitudes(module), magnitudes(again)
    ll.inject(fresh := lit(), lora(init).config)
    assert all(not torch.equal(before[name], value) for name, value in magnitudes(fresh).items())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(again.eval().net(X), module.eval().net(X))


@pytest.mark.parametrize("init", INITS)
def test_a_second_run_goes_on(tmp_path, init):
    trainer(lora(init)).fit(module := lit(), data())
    before = magnitudes(module)
    trainer(lora(init)).validate(module, data(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in magnitudes(module).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [False, True])
def test_what_was_not_trained_follows_another_base(dtype, copied):
    model, other = build().eval(), build(seed=5).eval()
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=True, modules_to_save=None))
    model = (copy.deepcopy(model) if copied else model).to(dtype)
    base = {k: v.to(dtype) for k, v in other.state_dict().items()}
    model.load_state_dict(base, strict=False)
    assert all(layer.lora_adapters()["default"].untouched for _, layer in lora_layers(model))
    torch.testing.assert_close(model(X.to(dtype)), other.to(dtype)(X.to(dtype)), rtol=1e-2, atol=1e-2)
    norms = other.to(dtype).blocks[0].q.weight.float().norm(dim=1)
    magnitude = model.blocks[0].q.lora["default"].magnitude.float()
    torch.testing.assert_close(magnitude, norms, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
