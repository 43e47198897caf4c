"""Merging: one rounding, a report of what it left, and the exact way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.comparators import BitFitConfig
from tests.helpers.families import FAMILIES, TIED, logits_of, tied
from tests.helpers.layers import randomise
from tests.helpers.toy import build
from tests.test_switch import with_heads


def adapted(dtype: torch.dtype, scale: float = 1.0, **options: object) -> nn.Module:
    model = build().to(dtype)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6, modules_to_save=None, **options))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data *= scale
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_one_rounding_in_bfloat16(use_dora):
    """The merged weight is the float32 result rounded once, and the report says what that costs."""
    model = adapted(torch.bfloat16, scale=3e-3, use_dora=use_dora)
    layer = model.blocks[0].q
    exact = layer.lora["default"].merged(layer.weight.float()).detach()
    base = layer.weight.float()
    report = ll.merge(model)
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    update, change = exact - base, layer.weight.float() - base
    entry = report.layers["blocks.0.q"]
    assert entry.norm == pytest.approx(update.norm().item(), rel=1e-4)
    assert entry.survived == pytest.approx(((change * update).sum() / update.square().sum()).item(), rel=1e-3)
    assert entry.error == pytest.approx(((change - update).norm() / update.norm()).item(), rel=1e-3)
    if not use_dora:
        assert 0.2 < entry.error < 2.0  # small updates suffer: this is what the report is for
    ll.unmerge(model)
    assert torch.equal(layer.weight.float(), base)


def test_another_dtype_for_merged_layers():
    model = adapted(torch.bfloat16, scale=3e-3)
    report = ll.merge(model, dtype="float32")
    layer = model.blocks[0].q
    assert {layer.weight.dtype, layer.bias.dtype} == {torch.float32}
    assert min(entry.survived for entry in report.layers.values()) == pytest.approx(1.0, abs=1e-4)
    ll.unmerge(model)
    assert {layer.weight.dtype, layer.bias.dtype} == {torch.bfloat16}


def test_merge_twice_from_train_mode_is_the_same():
    """Dropout is not merged."""
    model = adapted(torch.float32, lora_dropout=0.5).train()
    ll.merge(model)
    first = model.blocks[0].q.weight.clone()
    ll.unmerge(model)
    ll.merge(model)
    assert torch.equal(model.blocks[0].q.weight, first)


def test_rows_are_merged_in_chunks(monkeypatch):
    from lightning_lora.ops import norms

    whole, pieces = adapted(torch.float64, use_dora=True), adapted(torch.float64, use_dora=True)
    ll.merge(whole)
    monkeypatch.setattr(norms, "CHUNK", 40)
    ll.merge(pieces)
    torch.testing.assert_close(whole.state_dict(), pieces.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: (ll.merge(m), ll.merge(m)), ll.ConfigError, "merged already.*ll.unmerge"),
        (lambda m: ll.unmerge(m), ll.ConfigError, "no adapter is merged"),
        (lambda m: ll.merge(build()), ll.ConfigError, "no adapters"),
        (lambda m: ll.merge(m, []), ll.ConfigError, "adapter_names is empty. Known: .'default'."),
        (lambda m: ll.merge(m, dtype="bflaot16"), ll.ConfigError, "dtype must be a floating-point dtype"),
        (lambda m: ll.merge(m, dtype=torch.int8), ll.ConfigError, "dtype must be a floating-point dtype"),
        (lambda m: ll.merge_and_unload(build()), ll.ConfigError, "no adapters"),
        (lambda m: (ll.merge(m.blocks[0]), ll.merge_and_unload(m)), ll.ConfigError, "merged already into blocks.0"),
        (lambda m: ll.merge(m, "defualt"), ll.ConfigError, "Did you mean 'default'"),
        (lambda m: ll.merge(m, 3), ll.ConfigError, "there is no adapter 3. Known: .'default'."),
        (lambda m: ll.adapter_state_dict(m, ["default"]), ll.ConfigError, "there is no adapter .'default'.. Known"),
        (lambda m: (ll.merge(m), ll.eject(m)), ll.ConfigError, "ll.unmerge first"),
        (lambda m: (ll.merge(m), ll.inject(m, ll.LoRAConfig(), "new")), ll.ConfigError, "ll.unmerge before"),
    ],
)
def test_in_the_wrong_order(act, error, message):
    with pytest.raises(error, match=message):
        act(adapted(torch.float32))


def test_the_report_reads_well():
    model = adapted(torch.float32)
    text = str(ll.merge(model))
    assert text.splitlines()[0] == "merged 4 layers, of which 4 changed"
    assert "of the updates 100.0% survived rounding; least in blocks." in text


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_happens_to_a_merged_model_happens_to_its_base_too(use_dora):
    """Casts, copies and pickles; and nothing overwrites merged weights."""
    model, x = adapted(torch.float32, use_dora=use_dora), torch.randn(3, 16)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    ll.merge(model)
    assert model.state_dict().keys() == base.keys()
    assert len(list(model.parameters())) == len(base)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).double()
    assert model(x.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"adapters are merged into blocks.0.q: call ll.unmerge before loading"):
        model.load_state_dict(base)
    ll.unmerge(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, base[key].to(value.dtype)), key
    assert model.blocks[0].q.weight.dtype == torch.float64


def test_disabled_when_merged_in_another_dtype():
    """Weight and bias change places together."""
    model, x = adapted(torch.float32), torch.randn(3, 16)
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    ll.merge(model, dtype="float64")
    with ll.disable_adapters(model):
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert model.blocks[0].q.bias.dtype == torch.float64


def test_merging_one_of_two_adapters():
    """What was not merged is not active until `unmerge`, on no layer."""
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, target_modules=["q"], modules_to_save=None), "a")
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, target_modules=["o"], modules_to_save=None), "b")
    randomise(model)
    both = model(x)
    with ll.disable_adapters(model):
        base = model(x)
    ll.merge(model, "a")
    only_a = model(x)
    assert not torch.allclose(only_a, both)
    for layer in (block.o for block in model.blocks):
        assert layer.lora_active == ()
    with ll.disable_adapters(model):
        assert torch.equal(model(x), base)
    ll.unmerge(model)
    assert torch.equal(model(x), both)


# ---- on a probe batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_a_merge_changes_in_the_outputs(use_dora):
    """Of the model, and of each layer for the input that it gets; dropout and modes have no part in it."""
    model, x = adapted(torch.bfloat16, use_dora=use_dora, lora_dropout=0.5), torch.randn(5, 16, dtype=torch.bfloat16)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    twin = copy.deepcopy(model).eval()
    report = ll.merge(model, probe=x)
    assert [module.training for module in model.modules()] == modes
    seen = {}
    for name, layer in twin.named_modules():
        if hasattr(layer, "lora"):
            layer.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args, out)))
    merged = copy.deepcopy(model).eval()
    with torch.no_grad():  # as the probe is; with gradients sums are rounded in another order
        expected = twin(x)
    assert report.difference == (merged(x).double() - expected.double()).abs().max().item() > 0
    first = "blocks.0.q"  # the inputs of later ones are those of the merged model
    args, out = seen[first]
    difference = (merged.get_submodule(first)(*args).double() - out.double()).abs().max().item()
    assert report.layers[first].difference == difference > 0
    assert all(layer.difference is not None for layer in report.layers.values())
    assert f"on the probe batch the outputs of the model differ by at most {report.difference:.2g}, of a" in str(report)
    ll.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)


def test_probes_of_every_form():
    model, x = adapted(torch.float64), torch.randn(5, 16, dtype=torch.float64)
    for probe in (x, (x,), [x], {"x": x}):
        report = ll.merge(model, probe=probe)
        assert report.difference < 1e-12
        ll.unmerge(model)
    assert ll.merge(model).difference is None


def test_a_probe_that_does_not_fit_leaves_the_model_unmerged():
    model, x = adapted(torch.float32).eval(), torch.randn(5, 16)
    expected = model(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'input_ids'"):
        ll.merge(model, probe={"input_ids": x})
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith((".q", ".o")))


def test_a_probe_of_one_of_two_adapters_and_of_what_the_batch_goes_by():
    model = FAMILIES["llama"].make().double()
    model.extra = nn.Linear(4, 4).double()
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None, target_modules=["extra", "q_proj"]), "a")
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None, target_modules=["v_proj"], use_dora=True), "b")
    randomise(model)
    batch = {"input_ids": torch.randint(3, 61, (2, 7))}
    report = ll.merge(model, "a", probe=batch)
    assert report.difference < 1e-12
    assert report.layers["extra"].difference is None
    assert report.layers["model.layers.0.self_attn.q_proj"].difference < 1e-12
    assert not any("v_proj" in name for name in report.layers)


# ---- what may not be merged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("act", [ll.merge, ll.merge_and_unload])
def test_what_is_not_finite_is_refused_with_the_base_intact(act, value):
    model = adapted(torch.float32)
    model.blocks[1].o.lora["default"].B.data[2, 1] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ll.ConfigError, match="'default' holds NaN or infinite values on blocks.1.o: the run diverged"):
        act(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    assert model.blocks[0].q.lora_active == ("default",)


def test_a_base_that_is_not_finite_is_told_as_such():
    model = adapted(torch.bfloat16)
    with torch.no_grad():
        model.blocks[1].o.weight[0, 0] = torch.nan
    with pytest.raises(ll.ConfigError, match=r"blocks.1.o: NaN or infinite values when merged: the base has them"):
        ll.merge(model)
    assert model.blocks[1].o.lora_active == ("default",)


def test_a_model_with_another_methods_adapters_alone():
    ll.inject(model := build(), BitFitConfig(modules_to_save=None), "biases")
    with pytest.raises(ll.ConfigError, match="no adapters of LoRA: only these can be merged$"):
        ll.merge(model)
    with pytest.raises(ll.ConfigError, match="merge: adapter 'biases' is bitfit, and this takes adapters of LoRA only"):
        ll.merge(model, "biases")


def test_weights_that_grow_beyond_their_dtype_are_refused():
    model = adapted(torch.float16, scale=1e6)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ll.ConfigError, match="blocks.0.q, .*the update is too large for the dtype"):
        ll.merge(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert model.blocks[0].q.lora_active == ("default",)
    report = ll.merge(model, dtype="float32")
    assert report.layers["blocks.0.q"].survived == pytest.approx(1)


# ---- heads, and transformers -------------------------------------------------------------------------------------------


def test_the_head_of_what_is_merged_is_in_place(tmp_path):
    model, outputs, batch = with_heads(tmp_path)
    for name in ("second", "first"):
        ll.merge(model, name)
        torch.testing.assert_close(model(**batch).logits, outputs[name], rtol=1e-5, atol=1e-6)
        with ll.disable_adapters(model):
            assert torch.equal(model(**batch).logits, outputs["base"])
        torch.testing.assert_close(model(**batch).logits, outputs[name], rtol=1e-5, atol=1e-6)
        ll.unmerge(model)
        assert torch.equal(model(**batch).logits, outputs["first"]), "that of the active one"
    with pytest.raises(ll.ConfigError, match="'first' and 'second' both train classifier in full"):
        ll.merge(model, ["first", "second"])
    ll.set_adapter(model, "second")
    merged = ll.merge_and_unload(model)
    torch.testing.assert_close(merged(**batch).logits, outputs["second"], rtol=1e-5, atol=1e-6)
    assert merged.state_dict().keys() == FAMILIES["bert"].make().state_dict().keys()


RELOADED = {
    "llama": ({}, {}),
    "llama-bfloat16": ({}, {"dtype": torch.bfloat16}),
    "qwen2-tied": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "gpt2": ({"target_modules": ["c_attn", "wte"], "use_dora": True}, {}),
    "bert": ({"modules_to_save": ["classifier"], "bias": "all"}, {}),
    "t5": ({}, {}),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", RELOADED)
def test_merged_models_are_reloaded_by_transformers_alone(name, several, tmp_path):
    """Original classes and keys; tied weights that an adapter untied stay untied."""
    options, load = RELOADED[name]
    family = FAMILIES[name.removesuffix("-bfloat16")]
    family.make().save_pretrained(tmp_path / "base")
    base = type(family.make()).from_pretrained(tmp_path / "base", **load).eval()
    keys, classes = base.state_dict().keys(), [type(module) for module in base.modules()]
    for adapter in ("a", "b") if several else ("a",):
        ll.inject(base, ll.LoRAConfig(**{"r": 3, "lora_alpha": 5, **options} if adapter == "a" else {"r": 2}), adapter)
    randomise(base)
    batch = family.batch(base)
    if several:
        ll.set_adapter(base, {"a": 0.7, "b": -0.3} if name != "bert" else {"a": 0.7})
    expected = base(**batch).logits
    merged = ll.merge_and_unload(base)
    assert merged.state_dict().keys() == keys
    assert [type(module) for module in merged.modules()] == classes
    logits = merged(**batch).logits
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, **load).eval()
    assert torch.equal(again(**batch).logits, logits)
    tolerance = {"rtol": 0.1, "atol": 0.1} if load else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits, expected, **tolerance)
    if {"embed_tokens", "wte"} & {*options.get("target_modules", [])}:
        assert merged.config.tie_word_embeddings is False
        assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)


@pytest.mark.parametrize(("name", "end"), [(name, end) for name, (_, ends) in TIED.items() for end in ends])
def test_what_shares_a_weight_with_a_merged_layer_is_saved_too(name, end, tmp_path):
    """Transformers writes tied weights once, and ties them by its configuration when it loads them."""
    model = tied(name)
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, target_modules=[end], modules_to_save=None))
    for parameter in model.get_submodule(end).lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(tied(name)))
    merged = ll.merge_and_unload(model)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(merged))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in merged.state_dict().items())


# ---- for good ----------------------------------------------------------------------------------------------------------


def test_unloading_writes_in_place_but_not_into_what_is_tied():
    model = FAMILIES["qwen2-tied"].make()
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None, target_modules=["q_proj", "embed_tokens"]))
    randomise(model)
    query, table = model.model.layers[0].self_attn.q_proj.weight, model.lm_head.weight
    before = query.detach().clone(), table.detach().clone()
    ll.merge_and_unload(model)
    assert model.model.layers[0].self_attn.q_proj.weight is query
    assert not torch.equal(query, before[0])
    assert model.lm_head.weight is table
    assert torch.equal(table, before[1])
    assert not torch.equal(model.model.embed_tokens.weight, table)
    assert query.requires_grad
    assert model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_in_channels_last(use_dora):
    """Their kernel is no matrix in memory: what is made of a copy goes back into it."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers).to(torch.float64, memory_format=torch.channels_last)
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=7, use_dora=use_dora, target_modules=["0", "1", "2"]))
    randomise(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with ll.disable_adapters(model):
        base = model(x)
    adapted = model(x)
    assert not torch.allclose(adapted, base)
    ll.merge(model)
    torch.testing.assert_close(model(x), adapted)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    ll.unmerge(model)
    assert torch.equal(model(x), adapted)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_unloading_gives_what_merging_gives(dtype, use_dora):
    model = adapted(dtype, use_dora=use_dora)
    twin = copy.deepcopy(model)
    ll.merge(twin)
    expected = {key: value for key, value in twin.state_dict().items() if ".lora." not in key}
    torch.testing.assert_close(dict(ll.merge_and_unload(model).state_dict()), expected, rtol=0, atol=0)


def test_unloading_into_float16_changes_nothing_if_it_does_not_fit():
    model = adapted(torch.float16, scale=1e6)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ll.ConfigError, match="the update is too large for the dtype"):
        ll.merge_and_unload(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("names", "message"),
    [(["default", "default"], "a name is there twice"), ({"default": 0.5}, "merge takes names: call ll.set_adapter")],
)
def test_merging_takes_each_once(names, message):
    with pytest.raises(ll.ConfigError, match=message):
        ll.merge(adapted(torch.float32), names)
