"""Several adapters as one, and any adapter as a plain LoRA: by the formulas, in float64, on every layer."""

import copy

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, config_for, randomise
from tests.helpers.toy import build
from tests.layers.test_experts import model_of
from tests.test_switch import several, weighted_sum

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLAIN = {
    "korean": {"r": 3, "lora_alpha": 5, "target_modules": ["q"]},
    "coding": {"r": 2, "lora_alpha": 7},
    "poems": {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": "pissa", "target_modules": ["q", "o"]},
}
EQUAL = {name: {"r": 3, "lora_alpha": alpha} for name, alpha in (("korean", 5), ("coding", 2), ("poems", 7))}
WEIGHTS = {"korean": 0.7, "coding": -0.3, "poems": 1.5}
METHODS = ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties"]


def two_of(name: str, variants=("lora", "lora")) -> nn.Sequential:
    """A layer of a kind with two adapters that learned something."""
    model = CASES[name].model()
    for i, (adapter, variant) in enumerate(zip("ab", variants, strict=True)):
        ll.inject(model, config_for(variant, r=i + 2), adapter)
        randomise(nn.ModuleDict({"x": nn.ModuleDict({"lora": model[0].lora[adapter]})}), seed=i + 3)
    return model.eval()


def delta(layer: nn.Module, name: str) -> torch.Tensor:
    """What an adapter adds to the weight, by the equation of its variant."""
    W = layer.lora_matrix()
    return (layer.lora[name].merged(W.clone()) - W).detach()


def factors(layer: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    adapter = layer.lora[name]
    return *(f.detach() for f in adapter.update()), adapter.scaling


# ---- exactly ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_cat_is_the_sum_on_every_layer(name):
    model, x = two_of(name), CASES[name].input()
    ll.set_adapter(model, {"a": 0.7, "b": -0.3})
    expected = model(x)
    report = ll.combine_adapters(model, {"a": 0.7, "b": -0.3}, "both")
    assert model[0].lora_active == ("a", "b")
    ll.set_adapter(model, "both")
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    made = model[0].lora["both"]
    assert made.r == 5
    assert made.scaling == 1
    assert report.layers["0"].rank == 5
    assert report.layers["0"].error == 0
    assert report.layers["0"].norm == pytest.approx(float(delta(model[0], "both").norm()), rel=1e-12)


def test_cat_of_other_ranks_scales_targets_and_starts():
    model = several(PLAIN)
    ll.combine_adapters(model, WEIGHTS, "sum")
    ll.set_adapter(model, WEIGHTS)
    expected = model(X)
    ll.set_adapter(model, "sum")
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    ranks = {name: layer.lora["sum"].r for name, layer in lora_layers(model)}
    assert len(set(ranks.values())) > 1, "each layer the ranks of its own adapters; of PiSSA twice"


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties"])
def test_a_full_rank_loses_nothing(method):
    """DoRA's update is dense: what is left of it with rank 16 of 16 is all of it. Without pruning TIES of one is it."""
    model = several()
    weights = WEIGHTS if method in ("svd", "dare_linear") else {"coding": -0.4}
    report = ll.combine_adapters(model, weights, "all", method, rank=16, density=1.0)
    assert all(layer.error < 1e-7 for layer in report.layers.values())
    ll.set_adapter(model, "all")
    torch.testing.assert_close(model(X), weighted_sum(weights)(X), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_svd_of_dora_on_every_layer(name):
    model, x = two_of(name, ("dora", "lora")), CASES[name].input()
    ll.set_adapter(model, {"a": 0.7, "b": -0.3})
    expected = model(x)
    ll.combine_adapters(model, {"a": 0.7, "b": -0.3}, "both", "svd", rank=12)
    ll.set_adapter(model, "both")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adapters", [PLAIN, None], ids=["factors", "dense"])
def test_svd_is_the_best_approximation(adapters):
    model = several(adapters) if adapters else several()
    report = ll.combine_adapters(model, WEIGHTS, "best", "svd", rank=2)
    for name, layer in lora_layers(model):
        wanted = sum(WEIGHTS[n] * delta(layer, n) for n in WEIGHTS if n in layer.lora)
        S = torch.linalg.svdvals(wanted)
        lost = torch.linalg.matrix_norm(wanted - delta(layer, "best"))
        torch.testing.assert_close(lost, S[2:].norm(), rtol=1e-8, atol=1e-10)
        assert report.layers[name].error == pytest.approx(float(lost / wanted.norm()), rel=1e-7)
        assert report.layers[name].norm == pytest.approx(float(wanted.norm()), rel=1e-9)
        A, B, scale = factors(layer, "best")
        assert scale == 1
        torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-8, atol=1e-8, msg="the values are shared evenly")
    lines = str(report).splitlines()
    assert lines[0] == "'best': svd of 'korean', 'coding', 'poems' on 4 layers, rank 2"
    assert "the reduction of rank lost" in lines[1]


# ---- by the formulas -------------------------------------------------------------------------------------------------


def test_linear_is_that_of_the_factors_with_cross_terms():
    model = several(EQUAL)
    ll.combine_adapters(model, WEIGHTS, "linear", "linear")
    for _, layer in lora_layers(model):
        A = B = 0
        for name, weight in WEIGHTS.items():
            own_A, own_B, scale = factors(layer, name)
            root = abs(weight * scale) ** 0.5
            A, B = A + own_A * root * (1 if weight > 0 else -1), B + own_B * root
        torch.testing.assert_close(delta(layer, "linear"), B @ A, rtol=1e-10, atol=1e-10)
        assert layer.lora["linear"].r == 3
    ll.set_adapter(model, WEIGHTS)
    summed = model(X)
    ll.set_adapter(model, "linear")
    assert (model(X) - summed).norm() > 0.1 * summed.norm(), "it is not the sum"


def ties(tensors: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """TIES, entry by entry."""
    trimmed = []
    for tensor in tensors:
        order = sorted(range(tensor.numel()), key=lambda i: -abs(tensor.flatten()[i].item()))
        kept = set(order[: int(density * tensor.numel())])
        trimmed.append([value if i in kept else 0.0 for i, value in enumerate(tensor.flatten().tolist())])
    out = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [value * weight for value, weight in zip(entries, weights, strict=True) if value * sign > 0]
        out.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(out, dtype=torch.float64).view_as(tensors[0])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_of_updates(density):
    model = several()
    report = ll.combine_adapters(model, WEIGHTS, "elected", "ties", rank=16, density=density)
    for name, layer in lora_layers(model):
        here = {n: w for n, w in WEIGHTS.items() if n in layer.lora}
        expected = ties([delta(layer, n) for n in here], [*here.values()], density)
        torch.testing.assert_close(delta(layer, "elected"), expected, rtol=1e-7, atol=1e-9)
        assert report.layers[name].error < 1e-7


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_factors(density):
    model = several(EQUAL)
    ll.combine_adapters(model, WEIGHTS, "elected", "ties", density=density)
    for _, layer in lora_layers(model):
        found = [factors(layer, n) for n in WEIGHTS]
        roots = [abs(w * s) ** 0.5 for w, (_, _, s) in zip(WEIGHTS.values(), found, strict=True)]
        signed = [r if w > 0 else -r for r, w in zip(roots, WEIGHTS.values(), strict=True)]
        A, B, _ = factors(layer, "elected")
        torch.testing.assert_close(A, ties([f[0] for f in found], signed, density), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(B, ties([f[1] for f in found], roots, density), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "llama4"])
def test_experts_are_combined_one_by_one(family):
    """By the factors of PEFT, which takes A for B in Llama 4: the sign of a weight goes to A."""
    model, turned = model_of(family), family == "llama4"
    for i, name in enumerate("ab"):
        ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0 + i, target_modules=[], target_parameters="experts"), name)
    randomise(model)
    ll.combine_adapters(model, {"a": 0.7, "b": -0.3}, "linear", "linear")
    ll.combine_adapters(model, {"a": 0.7, "b": -0.3}, "ties", "ties", density=0.4)
    for _, layer in lora_layers(model):
        found = [factors(layer, name) for name in "ab"]
        roots = [(w * scale) ** 0.5 for w, (_, _, scale) in zip((0.7, 0.3), found, strict=True)]
        for i in range(4):
            A, B = (
                [factor[i].T if turned else factor[i] for factor in each] for each in list(zip(*found, strict=True))[:2]
            )
            A, B = (B, A) if turned else (A, B)
            signed, wanted = [roots[0], -roots[1]], {}
            wanted["linear"] = (B[0] * roots[0] + B[1] * roots[1]) @ (A[0] * signed[0] + A[1] * signed[1])
            wanted["ties"] = ties(B, roots, 0.4) @ ties(A, signed, 0.4)
            for name, update in wanted.items():
                expected = update.T if turned else update
                torch.testing.assert_close(delta(layer, name)[i], expected, rtol=1e-10, atol=1e-10)


def test_dare_keeps_the_expected_sum_and_draws_by_the_seed():
    model = build().double().eval()
    for name in "ab":
        ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, modules_to_save=None, target_modules=["q"]), name)
    randomise(model)
    _, layer = next(lora_layers(model))
    state, weights = torch.get_rng_state(), {"a": 0.7, "b": -0.3}
    wanted = sum(w * delta(layer, n) for n, w in weights.items())
    seen = []
    for seed in range(200):
        ll.combine_adapters(model, weights, "dare", "dare_linear", rank=16, density=0.6, seed=seed)
        seen.append(delta(layer, "dare"))
        ll.delete_adapter(model, "dare")
    spread = torch.stack(seen).std(0) / len(seen) ** 0.5
    assert ((torch.stack(seen).mean(0) - wanted).abs() <= 5 * spread + 1e-12).all()
    ll.combine_adapters(model, weights, "dare", "dare_linear", rank=16, density=0.6, seed=7)
    assert torch.equal(delta(layer, "dare"), seen[7])
    assert torch.equal(torch.get_rng_state(), state), "the user's random stream is untouched"
    assert not torch.equal(seen[7], seen[8])


def test_dare_drops_what_it_says():
    """Of a single adapter each entry of ΔW is either gone or divided by the density."""
    model = several()
    ll.combine_adapters(model, {"coding": 2.0}, "dare", "dare_linear", rank=16, density=0.75, seed=1)
    shares = []
    for _, layer in lora_layers(model):
        ratio = delta(layer, "dare") / (2.0 * delta(layer, "coding"))
        kept = ratio.abs() > 1e-6
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), rtol=1e-6, atol=1e-6)
        shares.append(kept.double().mean().item())
    assert sum(shares) / len(shares) == pytest.approx(0.75, abs=0.06)
    masks = {str((delta(layer, "dare").abs() > 1e-9).tolist()) for _, layer in lora_layers(model)}
    assert len(masks) == len(list(lora_layers(model))), "each layer draws its own"


# ---- an adapter like any other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_an_adapter_like_any_other(method, tmp_path):
    """It is saved and loaded in both ways, merged, trained, and taken off."""
    family = FAMILIES["llama"]
    model, batch = family.make().eval(), {"input_ids": torch.randint(3, 61, (2, 7))}
    base = copy.deepcopy(model)
    for i, name in enumerate(("korean", "coding")):
        ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=i + 2), name)
    randomise(model)
    before = model(**batch).logits.detach()
    report = ll.combine_adapters(
        model, {"korean": 0.7, "coding": -0.3}, "both", method, rank=2 if method == "svd" else None
    )
    assert torch.equal(model(**batch).logits, before), "it is not active"
    assert {layer.rank for layer in report.layers.values()} == {{"cat": 6, "svd": 2}.get(method, 3)}
    ll.set_adapter(model, "both")
    expected = model(**batch).logits.detach()
    ll.save_adapter(model, tmp_path / "both", "both")
    again = copy.deepcopy(base)
    ll.load_adapter(again, tmp_path / "both")
    assert torch.equal(again(**batch).logits, expected)
    fresh = copy.deepcopy(base)
    config = next(layer.lora["both"].config for _, layer in lora_layers(model))
    ll.inject(fresh, config, "both")
    fresh.load_state_dict(ll.adapter_state_dict(model, "both"))
    assert torch.equal(fresh(**batch).logits, expected)
    ll.delete_adapter(model, "korean")
    ll.delete_adapter(model, "coding")
    merged = ll.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    assert model(**batch, labels=batch["input_ids"]).loss < loss
    ll.delete_adapter(model, "both")
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_more_rank_than_there_is_can_still_be_trained():
    """What is beyond the update's own rank starts like a new LoRA: with both factors 0 it would be dead."""
    model = several(PLAIN)
    ll.combine_adapters(model, {"korean": 0.7}, "wide", "svd", rank=8)
    A, B, _ = factors(next(layer for _, layer in lora_layers(model) if "wide" in layer.lora), "wide")
    assert (A[3:].norm(dim=1) > 0).all()
    assert not B[:, 3:].any()
    ll.set_adapter(model, "wide")
    model(X).square().sum().backward()
    for _, layer in lora_layers(model):
        if "wide" in layer.lora:
            assert (layer.lora["wide"].B.grad[:, 3:] != 0).any(), "the new columns get gradients"


def test_of_adapters_that_are_active_with_weights():
    """An adapter's weight in the forward is not its weight in a combination."""
    model, other = several(), several()
    ll.set_adapter(model, {"korean": 0.2, "coding": 3.0})
    for each in (model, other):
        ll.combine_adapters(each, WEIGHTS, "all", "svd", rank=16)
        ll.set_adapter(each, "all")
    assert torch.equal(model(X), other(X))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_half_precision_is_worked_out_in_float32(dtypes):
    model, exact = build().eval(), build().eval()
    for each, kinds in ((model, dtypes), (exact, ("float32", "float32"))):
        for name, dtype in zip("ab", kinds, strict=True):
            ll.inject(each, ll.LoRAConfig(r=3, lora_alpha=5, modules_to_save=None), name)
            for _, layer in lora_layers(each):
                adapter = layer.lora[name]
                adapter.master_dtype = getattr(torch, dtype)
                adapter.to(getattr(torch, dtype))
        randomise(each)
    with torch.no_grad():
        for (_, rounded), (_, full) in zip(lora_layers(model), lora_layers(exact), strict=True):
            for name in "ab":
                full.lora[name].A.copy_(rounded.lora[name].A)
                full.lora[name].B.copy_(rounded.lora[name].B)
    for each in (model, exact):
        ll.combine_adapters(each, {"a": 0.7, "b": -0.3}, "both", "svd", rank=4)
    for (_, rounded), (_, full) in zip(lora_layers(model), lora_layers(exact), strict=True):
        made = rounded.lora["both"]
        assert made.A.dtype == torch.promote_types(*(getattr(torch, dtype) for dtype in dtypes))
        assert torch.equal(made.A, full.lora["both"].A.to(made.A.dtype)), "rounded once"


def test_a_head_comes_along():
    model = FAMILIES["bert"].make().eval()
    for name, saved in (("first", None), ("second", ["classifier"])):
        ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=saved), name)
    randomise(model)
    nn.init.normal_(model.classifier.weight)
    head = model.classifier.weight.detach().clone()
    ll.combine_adapters(model, {"first": 0.5, "second": 2.0}, "both")
    config = next(layer.lora["both"].config for _, layer in lora_layers(model))
    assert list(config.modules_to_save) == ["classifier"]
    ll.set_adapter(model, "both")
    assert torch.equal(model.classifier.weight, head)
    assert model.classifier.weight.requires_grad
    with torch.no_grad():
        model.classifier.weight.zero_()
    ll.set_adapter(model, "second")
    assert torch.equal(model.classifier.weight, head), "each has its own from now on"


# ---- what can't be -----------------------------------------------------------------------------------------------------


def test_all_problems_at_once_and_nothing_changed():
    model = several()
    before, keys = model(X).detach(), model.state_dict().keys()
    cases = {
        "there is no adapter 'corean'. Did you mean 'korean'": ({"corean": 0.7}, "x", "cat"),
        "the weight of 'korean' must be a finite number and not 0, got 0": ({"korean": 0}, "x", "cat"),
        "must be a finite number and not 0, got nan": ({"korean": float("nan")}, "x", "cat"),
        "adapter_name='korean' is taken": ({"korean": 0.7}, "korean", "cat"),
        "weights must map names of adapters to numbers": (["korean"], "x", "cat"),
        "weights must map": ({}, "x", "cat"),
        "method": ({"korean": 1.0}, "x", "sum"),
        "method='svd' needs a rank": ({"korean": 1.0}, "x", "svd"),
        "'coding' is a dora adapter, whose update has no low-rank factors": ({"coding": 1.0}, "x", "cat"),
        "method='linear' needs equal ranks, and on .* there are 3 for 'korean', 8 for 'poems'": (
            {"korean": 1.0, "poems": 1.0},
            "x",
            "linear",
        ),
    }
    for text, (weights, name, method) in cases.items():
        with pytest.raises(ll.ConfigError, match=text):
            ll.combine_adapters(model, weights, name, method)
    with pytest.raises(ll.ConfigError, match="(?s)'a.b'.*rank=4 is of no use.*density must be.*seed must be"):
        ll.combine_adapters(model, {"korean": 1.0}, "a.b", "cat", rank=4, density=0, seed=1.5)
    with pytest.raises(ll.ConfigError, match="rank must be a positive integer or None, got True"):
        ll.combine_adapters(model, {"korean": 1.0}, "x", "svd", rank=True)
    assert torch.equal(model(X), before)
    assert model.state_dict().keys() == keys


def test_refuses_what_would_be_wrong():
    model = several(PLAIN)
    ll.merge(model)
    for act in (lambda: ll.combine_adapters(model, {"korean": 1.0}, "x"), lambda: ll.to_lora(model, 2, "korean")):
        with pytest.raises(ll.ConfigError, match="adapters are merged into .*: call ll.unmerge first"):
            act()
    ll.unmerge(model)
    layer = next(layer for _, layer in lora_layers(model) if "korean" in layer.lora)
    with torch.no_grad():
        layer.lora["korean"].B[0, 0] = torch.inf
    for act in (lambda: ll.combine_adapters(model, {"korean": 1.0}, "x"), lambda: ll.to_lora(model, 2, "korean")):
        with pytest.raises(ll.ConfigError, match="adapter 'korean' holds NaN or infinite values on"):
            act()
    layer.lora["korean"].initialised = False
    with pytest.raises(ll.ConfigError, match="adapter 'korean' has no values yet on"):
        ll.combine_adapters(model, {"korean": 1.0}, "x")


def test_a_head_and_an_update_of_it_can_not_be_one(tmp_path):
    """As little as one adapter can have both: PEFT could not load it."""
    base = FAMILIES["llama"].make()
    for name, fields in {
        "full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "change": {"target_modules": ["lm_head"]},
        "rows": {"trainable_token_indices": {"model.embed_tokens": [1]}, "target_modules": ["q_proj"]},
        "table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }.items():
        model = copy.deepcopy(base)
        ll.inject(model, ll.LoRAConfig(r=2, **fields), name)
        randomise(model)
        ll.save_adapter(model, tmp_path / name, name)
        ll.load_adapter(base, tmp_path / name)
    for pair, layer in {("full", "change"): "lm_head", ("table", "rows"): "model.embed_tokens"}.items():
        with pytest.raises(ll.ConfigError, match=f"{layer}: trained in full by one of the adapters, and updated by"):
            ll.combine_adapters(base, dict.fromkeys(pair, 1.0), "both")
    ll.combine_adapters(base, {"full": 1.0, "table": 1.0}, "both")


def test_two_heads_can_not_be_one():
    model = FAMILIES["bert"].make()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"]), "first")
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=None), "second")
    from lightning_lora.injection.copies import bring

    bring(model.classifier, "second", {"weight": torch.zeros_like(model.classifier.weight)}, whole=True)
    with pytest.raises(ll.ConfigError, match="'first' and 'second' both train classifier in full: combine but one"):
        ll.combine_adapters(model, {"first": 1.0, "second": 1.0}, "both")


# ---- as a plain LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_dora_as_lora_on_every_layer(name):
    model, x = two_of(name, ("dora", "lora")), CASES[name].input()
    ll.set_adapter(model, "a")
    expected = model(x)
    report = ll.to_lora(model, rank=12, adapter_name="a")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    adapter = model[0].lora["a"]
    r = min(12, *model[0].lora_matrix_shape(model[0]))
    assert (adapter.variant, adapter.r, adapter.scaling) == ("lora", r, 1)
    assert not adapter.config.use_dora
    assert report.layers["0"].error < 1e-7


def test_to_lora_says_what_is_lost():
    model = several()
    W = {name: delta(layer, "coding") for name, layer in lora_layers(model) if "coding" in layer.lora}
    flags = [
        p.requires_grad for _, layer in lora_layers(model) for p in [layer.lora["coding"].A] if "coding" in layer.lora
    ]
    report = ll.to_lora(model, rank={"q": 3, "re:.*o": 5}, adapter_name="coding")
    for name, layer in lora_layers(model):
        r = layer.lora["coding"].r
        assert r == (3 if name.endswith("q") else 5 if name.endswith("o") else 2)
        lost = float((W[name] - delta(layer, "coding")).norm() / W[name].norm())
        assert report.layers[name].error == pytest.approx(lost, rel=1e-6)
        assert 0 < lost < 1
    assert flags == [layer.lora["coding"].A.requires_grad for _, layer in lora_layers(model)]
    assert "of the updates on average, most in" in str(report)


def test_to_lora_keeps_who_is_active_and_with_which_weight():
    model = several()
    ll.set_adapter(model, {"korean": 0.7, "coding": -0.3})
    expected = model(X)
    ll.to_lora(model, rank=16, adapter_name="coding")
    torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)
    assert all(set(layer.lora_active) <= {"korean", "coding"} for _, layer in lora_layers(model))
    ll.set_adapter(model, "coding")
    assert all(layer.lora["coding"].share is None for _, layer in lora_layers(model))


def test_to_lora_and_back_by_files(tmp_path):
    """What vLLM asks for: a folder without DoRA."""
    model = several()
    ll.to_lora(model, rank={"q": 16}, adapter_name="coding")
    ll.set_adapter(model, "coding")
    ll.save_adapter(model, tmp_path / "plain", "coding")
    fresh = build().double().eval()
    ll.load_adapter(fresh, tmp_path / "plain")
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-12, atol=1e-12)


def test_to_lora_of_one_rank_each_by_default():
    model = several(PLAIN)
    for name, options in PLAIN.items():
        ll.set_adapter(model, name)
        expected = model(X)
        report = ll.to_lora(model, adapter_name=name)
        if name != "poems":  # whose update has twice the rank
            torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)
        assert {layer.rank for layer in report.layers.values()} == {options["r"]}


def test_to_lora_refuses():
    model = several()
    for text, arguments in {
        "there is no adapter 'codin'": (2, "codin"),
        "rank must be a positive integer, {pattern: rank} or None, got 0": (0, "coding"),
        "rank: .zz. matches nothing": ({"zz": 2}, "coding"),
        "a positive integer": ({"q": 0}, "coding"),
    }.items():
        with pytest.raises(ll.ConfigError, match=text):
            ll.to_lora(model, *arguments)


def test_to_lora_of_a_packed_base_that_lacks_what_it_started_with():
    model = build().eval()
    ll.inject(model, ll.LoRAConfig(r=2, init_lora_weights="pissa", modules_to_save=None))
    ll.quantize(model, "nf4")
    with pytest.raises(ll.ConfigError, match="quantised without the first factors of 'default'"):
        ll.to_lora(model, 4)
    x = X.float()
    expected = model(x)
    ll.combine_adapters(model, {"default": 1.0}, "copy")
    ll.set_adapter(model, "copy")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_widest_dtype_of_the_sources_is_kept_wherever_it_stands():
    model = build().eval()
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32)):
        ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None), name)
        for _, layer in lora_layers(model):
            layer.lora[name].master_dtype = dtype
            layer.lora[name].to(dtype)
    randomise(model)
    ll.combine_adapters(model, {"a": 0.7, "b": -0.3}, "both")
    assert {layer.lora["both"].A.dtype for _, layer in lora_layers(model)} == {torch.float32}


def test_what_to_lora_replaces_asks_for_no_gradients_any_more():
    """An optimizer that was built before tells by that what to let go of."""
    model = several()
    olds = [layer.lora["coding"] for _, layer in lora_layers(model)]
    assert all(p.requires_grad for old in olds for p in old.parameters())
    ll.to_lora(model, rank=4, adapter_name="coding")
    assert not any(p.requires_grad for old in olds for p in old.parameters())


def test_a_bias_that_is_named_brings_no_others_along():
    """Of adapters with bias="none", one of which names a bias in modules_to_save."""
    model = build().eval()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=["blocks.0.o.bias"]), "a")
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q", "o"], modules_to_save=None), "b")
    randomise(model)
    ll.combine_adapters(model, {"a": 1.0, "b": 1.0}, "both")
    full = {key for key in ll.adapter_state_dict(model, "both") if ".lora.both." not in key or key.endswith("bias")}
    assert {key.replace(".lora.both", "") for key in full} == {"blocks.0.o.bias"}
