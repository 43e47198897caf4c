"""Several adapters on one base: by name, in sums with weights, for each sample its own, with heads of their own."""

import copy

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, VARIANTS, config_for, randomise
from tests.helpers.toy import build

THREE = {
    "korean": {"r": 3, "lora_alpha": 5, "target_modules": ["q"]},
    "coding": {"r": 2, "lora_alpha": 7, "use_dora": True},
    "poems": {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": "pissa", "target_modules": ["q", "o"]},
}


def several(adapters=THREE, model=None, dtype=torch.float64) -> nn.Module:
    """Adapters of different ranks, targets and variants on one base."""
    model = build().to(dtype).eval() if model is None else model
    for name, options in adapters.items():
        ll.inject(model, ll.LoRAConfig(**{"modules_to_save": None, **options}), name)
    for i, name in enumerate(adapters):
        for layer in (layer for _, layer in lora_layers(model) if name in layer.lora):
            randomise(nn.ModuleDict({"x": nn.ModuleDict({"lora": layer.lora[name]})}), seed=i + 3)
    return model


def alone(name: str, x: torch.Tensor) -> torch.Tensor:
    """What the model computes with this adapter and no other."""
    model = several()
    for other in THREE:
        if other != name:
            ll.delete_adapter(model, other)
    return model(x)


def weighted_sum(weights: dict[str, float]) -> nn.Module:
    """The plain network with W + Σ w (merged(W) - W), by the equations of the variants."""
    model, plain = several(), build().double().eval()
    for name, layer in lora_layers(model):
        W = layer.lora_matrix()
        total = W.clone()
        for adapter, weight in weights.items():
            if adapter in layer.lora:
                total += weight * (layer.lora[adapter].merged(W.clone()).detach() - W)
        plain.get_submodule(name).weight.data.copy_(total)
    return plain


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", THREE)
def test_by_name(name):
    model = several()
    ll.set_adapter(model, name)
    torch.testing.assert_close(model(X), alone(name, X), rtol=1e-12, atol=1e-12)
    trained = {n.split(".lora.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {name}
    ll.set_adapter(model, list(THREE))
    torch.testing.assert_close(model(X), weighted_sum(dict.fromkeys(THREE, 1.0))(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "weights", [{"korean": 0.7, "coding": 0.3}, {"poems": -1.5}, {"korean": 1, "coding": -1, "poems": 2}]
)
def test_by_weight(weights):
    model = several()
    ll.set_adapter(model, weights)
    expected = weighted_sum(weights)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(X), weighted_sum(dict.fromkeys(weights, 1.0))(X))
    ll.merge(model)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-10, atol=1e-10)
    ll.unmerge(model)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    y = X.clone().requires_grad_()
    expected(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    assert all(grad is not None for grad in grads)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    ll.set_adapter(model, next(iter(weights)))
    torch.testing.assert_close(model(X), alone(next(iter(weights)), X), rtol=1e-12, atol=1e-12)


def test_weights_are_not_saved(tmp_path):
    model = several({"korean": THREE["korean"]})
    expected = model(X)
    ll.set_adapter(model, {"korean": 0.5})
    ll.save_adapter(model, tmp_path / "a", "korean")
    other = build().double().eval()
    ll.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_on_a_quantised_base(mode):
    model = several(dtype=torch.float32)
    ll.quantize(model, mode)
    x = X.float()
    for weights in ({"korean": 1.0}, {"korean": 0.5, "coding": -0.4}, {"poems": 0.3}):
        ll.set_adapter(model, weights)
        total = {}
        for name, layer in lora_layers(model):
            W = layer.lora_matrix()
            parts = [layer.lora[n].merged(W.float().clone()).detach() - W for n in layer.lora_active]  # with weights
            total[name] = W.float() + sum(parts)
        plain = build().eval()
        for name, weight in total.items():
            plain.get_submodule(name).weight.data.copy_(weight)
        error = (model(x) - plain(x)).norm() / plain(x).norm()
        assert error < (2e-2 if mode == "int8" else 1e-4), weights


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ("koraen", "there is no adapter 'koraen'. Did you mean 'korean'"),
        ([], "no adapter is named; `with ll.disable_adapters"),
        (["korean", "korean"], "a name is there twice"),
        ({"korean": 0}, "the weight of 'korean' must be a finite number and not 0"),
        ({"korean": float("nan"), "codnig": 1}, "2 problems"),
        ({"korean": True}, "the weight of 'korean' must be"),
    ],
)
def test_what_is_refused(adapters, message):
    model = several()
    before = model(X)
    with pytest.raises(ll.ConfigError, match=message):
        ll.set_adapter(model, adapters)
    assert torch.equal(model(X), before)
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="merged into .*: call ll.unmerge first"):
        ll.set_adapter(model, "korean")
    with pytest.raises(ll.ConfigError, match="merged into .*: call ll.unmerge first"):
        ll.delete_adapter(model, "korean")


def test_deleting_all_adapters_gives_the_model_back():
    model = several()
    for name in THREE:
        ll.delete_adapter(model, name)
    assert list(model.state_dict()) == list(build().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(X), build().double().eval()(X))
    with pytest.raises(ll.ConfigError, match="there is no adapter 'korean'"):
        ll.delete_adapter(model, "korean")


@pytest.mark.parametrize("adapters", [None, 3, [["korean"]], ["korean", None], b"korean"], ids=str)
def test_what_is_no_name_of_an_adapter(adapters):
    model = several()
    before = model(X)
    with pytest.raises(ll.ConfigError, match=r"set_adapter: it takes a name, .*, got .*ll.disable_adapters"):
        ll.set_adapter(model, adapters)
    assert torch.equal(model(X), before)


# ---- mixed batches --------------------------------------------------------------------------------------------------------


def test_each_sample_has_its_own_adapter():
    model = several().train(False)
    names = ["coding", None, "korean", "poems", "coding"]
    with ll.mixed_batch(model, names):
        mixed = model(X)
    for i, name in enumerate(names):
        if name is None:
            with ll.disable_adapters(model):
                expected = model(X)
        else:
            ll.set_adapter(model, name)
            expected = model(X)
        torch.testing.assert_close(mixed[i], expected[i], rtol=1e-10, atol=1e-10)
    assert not any(layer.lora_mixture for _, layer in lora_layers(model))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "embedding-scaled", "conv2d", "conv2d-groups", "conv1d"])
def test_mixed_batches_on_every_layer(name, variant):
    case = CASES[name]
    model, x = case.model(), case.input()
    for i, adapter in enumerate(("a", "b")):
        ll.inject(model, config_for(variant), adapter)
        randomise(nn.ModuleDict({"x": nn.ModuleDict({"lora": model[0].lora[adapter]})}), seed=i + 3)
    names = [("a", "b", None)[i % 3] for i in range(len(x))]
    with ll.mixed_batch(model, names):
        mixed = model(x)
        mixed.square().sum().backward()
    assert all(p.grad is not None for p in model[0].lora.parameters())
    for i, adapter in enumerate(names):
        if adapter is None:
            torch.testing.assert_close(mixed[i], case.model()(x)[i], rtol=1e-10, atol=1e-10)
        else:
            ll.set_adapter(model, adapter)
            torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-10, atol=1e-10)


def test_mixed_batches_in_a_language_model():
    family = FAMILIES["llama"]
    model = several({n: {**THREE["coding"], "r": i + 2} for i, n in enumerate("ab")}, model=family.make().eval())
    ids = torch.randint(3, 61, (4, 7))
    with torch.no_grad(), ll.mixed_batch(model, ["a", "b", None, "a"]):
        mixed = model(input_ids=ids).logits
    with torch.no_grad(), ll.mixed_batch(model, ["a", "b", "__base__", "a"]):  # PEFT's word
        assert torch.equal(model(input_ids=ids).logits, mixed)
    with torch.no_grad():
        ll.set_adapter(model, "b")
        torch.testing.assert_close(mixed[1], model(input_ids=ids).logits[1], rtol=1e-4, atol=1e-5)
    with (
        ll.mixed_batch(model, ["a", "b"]),
        pytest.raises(ll.ConfigError, match="2 samples were assigned, .* is given 4"),
    ):
        model(input_ids=ids)
    with pytest.raises(ll.ConfigError, match="there is no adapter 'c'"), ll.mixed_batch(model, ["c"]):
        pass
    for wrong in ("ab", 3, None):
        with pytest.raises(ll.ConfigError, match=f"takes a list .* got {wrong!r}"), ll.mixed_batch(model, wrong):
            pass


@pytest.mark.parametrize(("family", "table"), [("t5", "relative_attention_bias"), ("gpt2", "wpe")])
def test_no_batch_is_mixed_where_no_dimension_counts_samples(family, table):
    """As many samples as tokens, so that sizes alone would not tell."""
    model, ids = FAMILIES[family].make().eval(), torch.randint(3, 61, (7, 7))
    batch = {"input_ids": ids} if family == "gpt2" else {"input_ids": ids, "decoder_input_ids": ids}
    tokens = "decoder.embed_tokens" if family == "t5" else "wte"
    for name, target in (("positions", table), ("tokens", tokens)):
        ll.inject(model, ll.LoRAConfig(r=2, target_modules=[target], modules_to_save=None), name)
    randomise(model)
    with (
        pytest.raises(ll.ConfigError, match=f"{table}: looked up by other things than tokens"),
        ll.mixed_batch(model, ["positions", *[None] * 6]),
    ):
        pass
    with torch.no_grad(), ll.mixed_batch(model, ["tokens", *[None] * 6]):
        mixed = model(**batch).logits
    ll.set_adapter(model, "tokens")
    torch.testing.assert_close(mixed[0], model(**batch).logits[0], rtol=1e-4, atol=1e-5)


# ---- compiled -------------------------------------------------------------------------------------------------------------


def test_switching_back_compiles_nothing():
    """One graph for each set of adapters, and none for other weights of the same set."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = several(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = X.float()
    with torch.no_grad():
        for adapters in ("korean", "coding", {"korean": 0.7, "coding": 0.3}):
            ll.set_adapter(model, adapters)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        known = len(graphs)
        assert known == 3
        for adapters in (
            "korean",
            {"korean": -2.0, "coding": 0.1},
            "coding",
            {"korean": 0.5, "coding": 0.25},
            "korean",
        ):
            ll.set_adapter(model, adapters)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(graphs) == known


# ---- heads of their own ----------------------------------------------------------------------------------------------------


def with_heads(tmp_path) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """Two adapters from folders, each with its own classifier, on one base; and what each computes by itself."""
    base = FAMILIES["bert"].make().eval()
    batch = {"input_ids": torch.randint(3, 61, (2, 7))}
    outputs = {}
    for i, name in enumerate(("first", "second")):
        model = copy.deepcopy(base)
        ll.inject(model, ll.LoRAConfig(r=i + 2, target_modules=["query"]), name)
        randomise(model, seed=i)
        nn.init.normal_(model.classifier.weight, std=i + 1.0)
        nn.init.normal_(model.classifier.bias)
        outputs[name] = model(**batch).logits.detach()
        ll.save_adapter(model, tmp_path / name, name)
    outputs["base"] = base(**batch).logits.detach()
    both = copy.deepcopy(base)
    ll.load_adapter(both, tmp_path / "first")
    ll.load_adapter(both, tmp_path / "second")
    return both, outputs, batch


def test_heads_change_place_with_their_adapters(tmp_path):
    model, outputs, batch = with_heads(tmp_path)
    for name in ("first", "second", "first"):
        ll.set_adapter(model, name)
        assert torch.equal(model(**batch).logits, outputs[name])
        assert model.classifier.weight.requires_grad
        with ll.disable_adapters(model):
            assert torch.equal(model(**batch).logits, outputs["base"])
        assert torch.equal(model(**batch).logits, outputs[name])
    with pytest.raises(ll.ConfigError, match="'first' and 'second' both train classifier in full: name one of them"):
        ll.set_adapter(model, ["first", "second"])
    with pytest.raises(ll.ConfigError, match="has its own Linear"), ll.mixed_batch(model, ["first", "second"]):
        pass


def test_each_is_saved_with_its_own_head(tmp_path):
    model, outputs, batch = with_heads(tmp_path)
    for name in ("first", "second"):
        ll.save_adapter(model, tmp_path / f"{name}-again", name)
        fresh = FAMILIES["bert"].make().eval()
        ll.load_adapter(fresh, tmp_path / f"{name}-again")
        assert torch.equal(fresh(**batch).logits, outputs[name])
    state = ll.adapter_state_dict(model)
    assert {"classifier.weight", "classifier.lora.second.weight"} < state.keys()
    twin = copy.deepcopy(model)
    ll.set_adapter(twin, "second")
    assert torch.equal(twin(**batch).logits, outputs["second"])


@pytest.mark.parametrize("active", ["first", "plain"])
def test_what_has_no_head_is_of_the_base_that_has_the_first_one(tmp_path, active):
    model, outputs, batch = with_heads(tmp_path)
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=None), "plain")
    ll.set_adapter(model, active)
    ll.save_adapter(model, tmp_path / "plain", "plain")
    fresh = FAMILIES["bert"].make().eval()
    ll.load_adapter(fresh, tmp_path / "plain")
    assert torch.equal(fresh(**batch).logits, outputs["base"])
    with torch.no_grad():
        (other := FAMILIES["bert"].make().eval()).classifier.weight.add_(1)
    with pytest.raises(ll.BaseMismatchError, match=r"1 of \d+ weights have other values: classifier.weight"):
        ll.load_adapter(other, tmp_path / "plain")


def test_deleting_gives_the_head_back(tmp_path):
    model, outputs, batch = with_heads(tmp_path)
    ll.set_adapter(model, "second")
    ll.delete_adapter(model, "second")
    assert torch.equal(model(**batch).logits, outputs["base"])
    assert not model.classifier.weight.requires_grad
    ll.set_adapter(model, "first")
    assert torch.equal(model(**batch).logits, outputs["first"])
    ll.delete_adapter(model, "first")
    assert torch.equal(model(**batch).logits, outputs["base"])
    assert model.classifier.weight.requires_grad
    assert model.state_dict().keys() == FAMILIES["bert"].make().state_dict().keys()


def test_ejecting_gives_the_head_back(tmp_path):
    model, outputs, batch = with_heads(tmp_path)
    ll.eject(model)
    assert torch.equal(model(**batch).logits, outputs["base"])


def test_a_head_that_is_trained_in_place_is_trained_with_its_adapter_alone():
    model = FAMILIES["bert"].make()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=None), "plain")
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]), "headed")
    for name, trained in (("plain", False), ("headed", True), ("plain", False)):
        ll.set_adapter(model, name)
        assert model.classifier.weight.requires_grad is trained
    ll.combine_adapters(model, {"plain": 2.0}, "twice")
    assert not model.classifier.weight.requires_grad
    ll.set_adapter(model, ["plain", "headed"])
    assert model.classifier.weight.requires_grad


# ---- tied weights that adapters train in full ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "saved"), [("qwen2-tied", "embed_tokens"), ("gpt2", "wte"), ("t5", "shared")])
def test_tied_weights_change_place_as_one(tmp_path, family, saved):
    """Both ends of a weight are in a folder, and are one tensor in the model."""
    base = FAMILIES[family].make().eval()
    batch, outputs = FAMILIES[family].batch(base), {}
    outputs["base"] = base(**batch).logits.detach()
    for i, name in enumerate("ab"):
        model = copy.deepcopy(base)
        ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=[saved]), name)
        randomise(model, seed=i)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=i + 1.0)
        outputs[name] = model(**batch).logits.detach()
        ll.save_adapter(model, tmp_path / name, name)
    model = copy.deepcopy(base)
    for name in "ab":
        ll.load_adapter(model, tmp_path / name)
    for name in "abab":
        ll.set_adapter(model, name)
        torch.testing.assert_close(model(**batch).logits, outputs[name], rtol=1e-5, atol=1e-5)
        with ll.disable_adapters(model):
            torch.testing.assert_close(model(**batch).logits, outputs["base"], rtol=1e-5, atol=1e-5)
    ll.save_adapter(model, tmp_path / "again", "a")  # while b is in place
    fresh = copy.deepcopy(base)
    ll.load_adapter(fresh, tmp_path / "again")
    torch.testing.assert_close(fresh(**batch).logits, outputs["a"], rtol=1e-5, atol=1e-5)
    ll.eject(model)
    torch.testing.assert_close(model(**batch).logits, outputs["base"], rtol=1e-5, atol=1e-5)


# ---- one head, two adapters --------------------------------------------------------------------------------------------------


def test_a_head_that_another_adapter_trains(tmp_path):
    model, _, _ = with_heads(tmp_path)
    with pytest.raises(ll.ConfigError, match="classifier is trained in full with adapter 'first': leave it out of"):
        ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["classifier"]), "third")
    plan = ll.inject(model, ll.LoRAConfig(r=2), "third")
    assert plan.modules_to_save == ()
    assert plan.skipped["classifier"] == "trained in full with adapter 'first'"
    assert not any("lora" not in key for key in ll.adapter_state_dict(model, "third"))


# ---- within contexts -----------------------------------------------------------------------------------------------------------


ACTS = {
    "set_adapter": lambda m: ll.set_adapter(m, "coding"),
    "delete_adapter": lambda m: ll.delete_adapter(m, "korean"),
    "merge": lambda m: ll.merge(m),
    "merge_and_unload": lambda m: ll.merge_and_unload(m),
    "eject": lambda m: ll.eject(m),
    "LoRA": lambda m: ll.inject(m, ll.LoRAConfig(modules_to_save=None), "new"),
    "combine_adapters": lambda m: ll.combine_adapters(m, {"korean": 1.0}, "new"),
    "to_lora": lambda m: ll.to_lora(m, 2, "coding"),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("context", ["disable_adapters", "mixed_batch"])
def test_nothing_is_changed_under_a_context(act, context):
    model = several()
    before, flags = model(X).detach(), {n: p.requires_grad for n, p in model.named_parameters()}
    arguments = (["korean"] * 5,) if context == "mixed_batch" else ()
    with (
        pytest.raises(ll.ConfigError, match=rf"{act}: the model is in `with ll.{context}\(...\)`: leave that first"),
        getattr(ll, context)(model, *arguments),
    ):
        ACTS[act](model)
    assert torch.equal(model(X), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    ll.set_adapter(model, "coding")


@pytest.mark.parametrize("context", ["disable_adapters", "mixed_batch"])
def test_no_adapters_come_to_a_bare_model_under_a_context(context, tmp_path):
    ll.save_adapter(several(), tmp_path / "korean", "korean")
    model = build().double().eval()
    arguments = ([None] * 5,) if context == "mixed_batch" else ()
    with getattr(ll, context)(model, *arguments):
        for act in (ACTS["LoRA"], lambda m: ll.load_adapter(m, tmp_path / "korean")):
            with pytest.raises(ll.ConfigError, match=rf"in `with ll.{context}\(...\)`: leave that first"):
                act(model)
    assert not list(lora_layers(model))
    ACTS["LoRA"](model)


@pytest.mark.parametrize("merged", [False, True])
def test_disabling_twice(merged):
    model, base = several(), build().double().eval()(X)
    if merged:
        ll.merge(model)
    before = model(X)
    with ll.disable_adapters(model):
        with ll.disable_adapters(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), before)


def test_unmerging_while_disabled_would_lose_the_base():
    model = several()
    before = model(X).detach()
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="unmerge: the model is in"), ll.disable_adapters(model):
        ll.unmerge(model)
    ll.unmerge(model)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_that_is_made_in_a_context_is_in_none(merged):
    model = several()
    if merged:
        ll.merge(model)
    with ll.disable_adapters(model):
        twin = copy.deepcopy(model)
    for each in (twin, model) if merged else ():
        ll.unmerge(each)
    ll.set_adapter(twin, "korean")
    ll.set_adapter(model, "korean")
    assert torch.equal(twin(X), model(X))


def test_weights_have_no_part_in_mixed_batches():
    model = several()
    ll.set_adapter(model, "korean")
    expected = model(X)
    ll.set_adapter(model, {"korean": 0.1, "coding": 2.0})
    weighted = model(X)
    with ll.mixed_batch(model, ["korean"] * len(X)):
        torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(X), weighted)


@pytest.mark.parametrize("own", [{"modules_to_save": ["2"]}, {"bias": "lora_only"}])
def test_a_mixed_batch_without_the_active_adapter_has_nothing_of_it(own, tmp_path):
    """Not its adapters, and neither its head or its biases, which lie in the place of the base's."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), torch.randn(2, 4).double()
    expected, model = base(x), copy.deepcopy(base)
    for name, options in {"a": own, "b": {}}.items():
        made = copy.deepcopy(base)
        ll.inject(made, ll.LoRAConfig(**{"r": 2, "target_modules": ["0"], "modules_to_save": None, **options}), name)
        for parameter in filter(lambda p: p.requires_grad, made.parameters()):
            nn.init.normal_(parameter)
        ll.save_adapter(made, tmp_path / name, name)
        ll.load_adapter(model, tmp_path / name)
    before = model(x)
    with ll.mixed_batch(model, [None, "b"]):
        mixed = model(x)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-10, atol=1e-10)
    ll.set_adapter(model, "b")
    torch.testing.assert_close(mixed[1], model(x)[1], rtol=1e-10, atol=1e-10)
