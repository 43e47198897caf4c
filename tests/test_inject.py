"""Injection: initial values, names, freezing, failure, and the way back."""

import copy
import pickle
from dataclasses import replace

import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.injection import inject
from lightning_lora.injection.inject import carry_out
from lightning_lora.layers import lora_layers
from lightning_lora.targets import draft
from lightning_lora.targets.walk import nodes
from tests.helpers.families import DECODER, FAMILIES, KV
from tests.helpers.layers import randomise
from tests.helpers.modules import Wrapped, one_batch, trainer
from tests.helpers.toy import build

CONFIG = ll.LoRAConfig(r=4)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ll.adapter_state_dict(model).items()}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values(init):
    model = nn.Sequential(nn.Linear(400, 300))
    ll.inject(model, ll.LoRAConfig(r=50, init_lora_weights=init))
    adapter = model[0].lora["default"]
    assert adapter.B.count_nonzero() == 0
    if init == "kaiming":  # uniform in ±1/sqrt(in), as PEFT has it
        assert adapter.A.abs().max() <= 400**-0.5
        assert adapter.A.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)
    else:
        assert adapter.A.std().item() == pytest.approx(1 / 50, rel=0.02)


def test_initial_values_depend_on_seed_and_name_alone():
    first, second = build(), build()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ll.inject(first, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)  # the user's random stream is not touched
    torch.randn(10)
    ll.inject(second, CONFIG)
    assert all(torch.equal(value, values(second)[key]) for key, value in values(first).items())
    assert not torch.equal(values(first)["blocks.0.q.lora.default.A"], values(first)["blocks.1.q.lora.default.A"])
    torch.manual_seed(8)
    third = build()
    ll.inject(third, CONFIG)
    assert not torch.equal(values(first)["blocks.0.q.lora.default.A"], values(third)["blocks.0.q.lora.default.A"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_magnitudes_are_the_norms_of_the_rows(dtype):
    model = nn.Sequential(nn.Linear(2000, 700)).to(dtype)
    ll.inject(model, ll.LoRAConfig(use_dora=True))
    magnitude = model[0].lora["default"].magnitude
    torch.testing.assert_close(magnitude.double(), model[0].weight.double().norm(dim=1), rtol=1e-6, atol=0)


def test_zero_rows_stay_finite_and_can_learn():
    """Llama-3.1-8B has hundreds of rows of zeros in o_proj; PEFT's DoRA gives NaN there."""
    model = nn.Sequential(nn.Linear(8, 6))
    model[0].weight.data[2:4] = 0
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    adapter = model[0].lora["default"]
    assert all(torch.isfinite(p).all() for p in adapter.parameters())
    assert adapter.B[2:4].count_nonzero() == 4
    assert adapter.magnitude[2:4].count_nonzero() == 2
    ll.merge(model)
    assert torch.isfinite(model(x)).all()


def test_idempotent_and_incremental():
    model = build()
    plan = ll.inject(model, CONFIG)
    nn.init.ones_(model.blocks[0].q.lora["default"].B)
    trained = values(model)
    assert ll.inject(model, CONFIG) == plan
    assert all(torch.equal(value, trained[key]) for key, value in values(model).items())
    model.blocks.append(copy.deepcopy(build().blocks[0]))
    ll.inject(model, CONFIG)
    assert len(dict(lora_layers(model))) == 6
    assert all(torch.equal(values(model)[key], value) for key, value in trained.items())


def test_a_name_belongs_to_one_configuration():
    model = build()
    ll.inject(model, CONFIG)
    with pytest.raises(ll.ConfigError, match=r"'default' \(on blocks.0.q\) with another configuration: r: 4 -> 2"):
        ll.inject(model, ll.LoRAConfig(r=2))
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"]), "other")
    assert {name: config.r for name, config in ll.adapters(model).items()} == {"default": 4, "other": 2}
    assert model.blocks[0].q.lora_active == ("default", "other")
    assert len(ll.adapter_state_dict(model, "other")) == 4
    with pytest.raises(ll.ConfigError, match="there is no adapter 'othre'. Did you mean 'other'"):
        ll.adapter_state_dict(model, "othre")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ll.LoRA(r=2), r"the callback LoRA, which a Trainer takes: give its configuration, LoRAConfig\(\.\.\.\)"),
        (ll.comparators.BitFit(), r"the callback BitFit, .* BitFitConfig\(\.\.\.\)"),
        (peft.LoraConfig(r=2), "PEFT's LoraConfig: the fields of ll.LoRAConfig have the same names"),
        ({"r": 2}, r"dict: give ll.LoRAConfig\(\*\*{'r': 2}\)"),
        ("all-linear", "'all-linear'"),
        (None, "None"),
    ],
)
def test_what_is_no_configuration(config, message):
    model = nn.Sequential(nn.Linear(4, 4))
    for given in (ll.plan, ll.inject):
        with pytest.raises(ll.ConfigError, match=f"config must be a LoRAConfig, got {message}"):
            given(model, config)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_several_adapters_add_up():
    """W + sum of what each makes of W, whatever their ranks and variants."""
    from tests.helpers.layers import randomise

    model, x = build().double(), torch.randn(3, 16, dtype=torch.float64)
    ll.inject(model, ll.LoRAConfig(r=4, target_modules=["q"]), "a")
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q", "o"], use_dora=True), "b")
    randomise(model)
    layer = model.blocks[0].q
    W = layer.weight.detach()
    expected = W + sum(layer.lora[name].merged(W.clone()).detach() - W for name in ("a", "b"))
    before = layer(x)
    torch.testing.assert_close(before, nn.functional.linear(x, expected, layer.bias))
    ll.merge(model)
    torch.testing.assert_close(layer.weight.data, expected)
    ll.unmerge(model)
    ll.merge(model, "a")
    torch.testing.assert_close(layer.weight.data, layer.lora["a"].merged(W.clone()).detach())
    ll.unmerge(model)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["lora", "default", "blocks", "q", "weight", "A", "my-adapter", "0"])
def test_names_like_parts_of_paths(name):
    """PEFT edits keys as strings, and truncates what is named like a module."""
    model = build()
    ll.inject(model, CONFIG, name)
    keys = ll.adapter_state_dict(model).keys()
    assert len(keys) == 10
    assert f"blocks.0.q.lora.{name}.A" in keys
    other = build()
    ll.inject(other, CONFIG, name)
    other.load_state_dict(model.state_dict(), strict=True)


def test_works_on_a_part_of_the_model():
    model = build()
    ll.inject(model.blocks, ll.LoRAConfig(r=4))
    assert next(iter(ll.adapter_state_dict(model.blocks))) == "0.q.lora.default.A"
    assert next(iter(ll.adapter_state_dict(model))) == "blocks.0.q.lora.default.A"
    assert model.head.weight.requires_grad
    assert ll.adapters(model) == ll.adapters(model.blocks)
    ll.eject(model.blocks)
    assert all(p.requires_grad for p in model.parameters())


def test_eject_restores_flags_classes_and_modes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    assert not model.train()[1].training
    ll.eject(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert model[1].training


def test_eject_gives_statistics_the_mode_that_was_asked_for():
    """Of the layer itself, not of the model: users put a BatchNorm into eval mode alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].eval()
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.eject(model)
    assert [m.training for m in model] == [True, False, True]
    ll.inject(model, ll.LoRAConfig(r=2))
    model.eval()
    ll.eject(model)
    assert [m.training for m in model] == [False, False, False]


def test_statistics_get_the_mode_around_them_also_where_modes_were_put_back_one_by_one():
    """As Lightning does behind a validation."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    model.train()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, mode in modes:
        module.training = mode
    ll.delete_adapter(model, "default")
    assert [m.training for m in model] == [True, True, True]


def test_a_linear_that_keeps_statistics():
    class Standardised(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("running_mean", torch.zeros(4))

    model = nn.Sequential(Standardised(), nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.eject(copy.deepcopy(model))
    assert model.train()[0].training
    assert set(dict(lora_layers(model))) == {"0", "1"}


def test_modules_with_statistics_keep_the_mode_of_their_children():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))
            self.drop = nn.Dropout(0.5)

    model = nn.Sequential(nn.Linear(4, 4), Normalised())
    ll.inject(model, ll.LoRAConfig(r=2))
    model.train()
    assert (model[1].training, model[1].drop.training) == (False, True)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_defaults_of_the_surroundings_do_not_matter(init):
    """Models are built within ``torch.device`` and under other default dtypes; adapters are drawn as ever."""
    plain, other = build(), build()
    config = ll.LoRAConfig(r=4, init_lora_weights=init)
    ll.inject(plain, config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            ll.inject(other, config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda A, B: (A, B, A), r"two tensors, A and B, and gave \(Tensor, Tensor, Tensor\)"),
        (lambda A, B: (A.T, B), r"tensors A and B of shapes \(8, 16\) and"),
        (lambda A, B: (A[:1], B), r"tensors A and B of shapes \(8, 16\) and"),
        (lambda A, B: (A, None), r"two tensors, A and B, and gave \(Tensor, NoneType\)"),
        (lambda A, B: None, "two tensors, A and B, and gave None"),
        (lambda A, B: A, "two tensors, A and B, and gave Tensor"),
    ],
)
def test_what_an_init_returns_is_checked(result, said):
    class Odd(ll.inits.Init):
        def __call__(self, W, r, scale, generator):
            return result(torch.ones(r, W.shape[1]), torch.zeros(W.shape[0], r))

    model = build()
    with pytest.raises(ll.TargetError, match=f"blocks.0.q: Odd must return {said}"):
        ll.inject(model, ll.LoRAConfig(init_lora_weights=Odd()))
    assert not ll.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_first_values_that_are_not_finite_are_refused():
    model = build()
    with pytest.raises(ll.TargetError, match=r"blocks.0.q: <lambda> gave values that are not finite"):
        ll.inject(model, ll.LoRAConfig(init_lora_weights=lambda W, r, *_: (W[:r] * torch.nan, W[:, :r])))
    assert not ll.adapters(model)


def test_roles_may_change_while_a_model_grows():
    """What is injected twice is what one injection would have made of the whole."""
    model = nn.ModuleDict({"classifier": nn.Linear(8, 3)})
    ll.inject(model, ll.LoRAConfig(r=2))
    assert list(dict(lora_layers(model))) == ["classifier"]
    model["body"] = nn.Linear(8, 8)
    ll.inject(model, ll.LoRAConfig(r=2))
    assert list(dict(lora_layers(model))) == ["body"]
    assert model["classifier"].weight.requires_grad
    assert set(ll.adapter_state_dict(model)) == {
        "classifier.weight", "classifier.bias", "body.lora.default.A", "body.lora.default.B"
    }  # fmt: skip


def test_dora_follows_weights_until_it_is_trained():
    model, other = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=True))
    magnitude = model[0].lora["default"].magnitude
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(magnitude.data, other[0].weight.norm(dim=1))
    nn.init.ones_(model[0].lora["default"].B)
    model.load_state_dict(nn.Sequential(nn.Linear(8, 8)).state_dict())
    torch.testing.assert_close(magnitude.data, other[0].weight.norm(dim=1))


def test_a_failure_half_way_leaves_nothing(monkeypatch):
    model = build()
    real, calls = inject.attach, []

    def fails_at_the_third(layer, name, adapter):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        real(layer, name, adapter)

    monkeypatch.setattr(inject, "attach", fails_at_the_third)
    before = {name: (type(m), vars(m).keys()) for name, m in copy.deepcopy(model).named_modules()}
    with pytest.raises(MemoryError):
        ll.inject(model, CONFIG)
    assert {name: (type(m), vars(m).keys()) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_meta_models():
    with torch.device("meta"):
        model = build_llama()
    ll.inject(model, ll.LoRAConfig(r=4, use_dora=True))
    assert all(p.is_meta for p in model.parameters())
    real = build_llama()
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=True)
    ll.inject(model, ll.LoRAConfig(r=4, use_dora=True))  # gives the adapters their values, now that there is a base
    ll.inject(real, ll.LoRAConfig(r=4, use_dora=True))
    assert all(torch.equal(value, values(real)[key]) for key, value in values(model).items())


def build_llama() -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, **KV))


def test_users_hooks_and_references_stay():
    model, seen = build(), []
    layer = model.blocks[0].q
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    ll.inject(model, CONFIG)
    assert model.blocks[0].q is layer
    assert isinstance(layer, nn.Linear)
    model(torch.randn(2, 16))
    layer.forward(torch.randn(2, 16))
    layer(input=torch.randn(2, 16))
    assert len(seen) == 2


def test_equal_blocks_share_a_class():
    model = build()
    ll.inject(model, CONFIG)
    assert len({type(layer) for _, layer in lora_layers(model)}) == 1


def test_frozen_statistics_stay_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    ll.inject(model, ll.LoRAConfig(r=2))
    model.train()
    assert [m.training for m in model] == [True, False, True]
    assert isinstance(model[1], nn.BatchNorm1d)
    twin = copy.deepcopy(model)
    assert not twin.train()[1].training


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_is_trained_in_full(end, tmp_path):
    """It is trained whichever end is named, saved once, and no part of the base."""
    module = Wrapped(FAMILIES["qwen2-tied"].make)
    batch = FAMILIES["qwen2-tied"].batch(module.net)
    run = trainer(ll.LoRA(r=4, target_modules=["q_proj"], modules_to_save=[end]), max_steps=2)
    run.fit(module, one_batch(batch))
    assert module.net.lm_head.weight is module.net.model.embed_tokens.weight
    assert module.net.lm_head.weight.requires_grad
    run.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert sum(end in key for key in keys) == 1
    other = Wrapped(FAMILIES["qwen2-tied"].make)
    lora = ll.LoRA(r=4, target_modules=["q_proj"], modules_to_save=[end])
    (out,) = trainer(lora).predict(other, one_batch(batch, 1), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(out, module.eval().net(**batch).logits)


def test_tied_weights(tmp_path):
    """Both ends keep working: an adapter on one end does not change the other, merged or not, saved or not."""
    model = FAMILIES["qwen2-tied"].make().eval()
    tokens = torch.randint(3, 61, (2, 7))
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora["default"].A)
        nn.init.normal_(layer.lora["default"].B, std=0.02)
    active, head = model(tokens).logits, model.lm_head.weight
    report = ll.merge(model)
    assert report.layers["model.embed_tokens"].untied == ("lm_head.weight",)
    assert "tied weights were untied: model.embed_tokens" in str(report)
    assert model.lm_head.weight is head
    torch.testing.assert_close(model(tokens).logits, active, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    ll.merge_and_unload(model)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, active, rtol=1e-4, atol=1e-5)


def test_save_pretrained_would_leave_adapters_behind(tmp_path):
    """transformers would write them under names that it does not read: the folder would load as the base."""
    model = FAMILIES["llama"].make().eval()
    tokens, own = torch.arange(1, 6)[None], type(model).save_pretrained
    base = model(tokens).logits
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=6))
    randomise(model)
    active = model(tokens).logits
    for each in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ll.ConfigError, match=r"save_pretrained: .*q_proj.* have adapters.* ll.save_adapter"):
            each.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()

    def loaded():
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")(tokens).logits

    for method, given in (("add_adapter", peft.LoraConfig(target_modules=["q_proj"])), ("load_adapter", "somewhere")):
        with pytest.raises(ll.ConfigError, match=f"{method}: the model has adapters of lightning_lora, and PEFT would"):
            getattr(model, method)(given)
    assert torch.equal(model(tokens).logits, active)
    ll.merge(model)
    model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(), active, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    with pytest.raises(ll.ConfigError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "a")
    ll.eject(model)
    assert not {"save_pretrained", "add_adapter", "load_adapter"} & {*vars(model)}
    assert type(model).save_pretrained is own
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(loaded(), base)

    class Own(pl.LightningModule):
        """Whose methods know of adapters."""

        def __init__(self):
            super().__init__()
            self.net = build()

        def save_pretrained(self, folder):
            ll.save_adapter(self, folder)

        def load_adapter(self, folder):
            ll.load_adapter(self, folder)

    ll.inject(own := Own(), ll.LoRAConfig(r=2))
    own.save_pretrained(tmp_path / "own")
    own.load_adapter(tmp_path / "own")


def drafted(model, config):
    plan, problems = draft(model, config, nodes(model))
    assert not problems
    return plan


def test_an_adapter_that_learnt_stays_where_a_later_plan_has_none():
    model, config = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), ll.LoRAConfig(r=2)
    ll.inject(model, config)
    plan = drafted(model, config)
    nn.init.ones_(model["b"].lora["default"].B)
    carry_out(model, config, replace(plan, targets=tuple(t for t in plan.targets if t.name == "a")), "default")
    assert model["b"].lora["default"].B.all()


def test_what_a_later_plan_does_not_train_is_frozen():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    config = ll.LoRAConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    plan = ll.inject(model, config)
    assert model["head"].weight.requires_grad
    carry_out(model, config, replace(plan, modules_to_save=()), "default")
    assert not model["head"].weight.requires_grad


def test_adapters_of_other_names_start_with_other_values():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        ll.inject(model, CONFIG, name)
    assert not torch.equal(model[0].lora["a"].A, model[0].lora["b"].A)
