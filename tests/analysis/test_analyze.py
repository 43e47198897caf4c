"""What an analysis says is what dense algebra says, and what constructions were made to give."""

import copy
import json
import math
import sys

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.analysis import analyze_files, subspace_similarity
from lightning_lora.analysis.factor_grams import measure
from lightning_lora.layers import lora_layers
from tests.commands.files import adapted as adapted_model
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, VARIANTS, adapted, randomise

CLOSE = {"rel": 1e-10, "abs": 1e-12}


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def linear(W: Tensor, A: Tensor | None = None, B: Tensor | None = None, **options) -> nn.Sequential:
    """A linear layer of float64 with this weight, and an adapter whose update is B A."""
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float64))
    model[0].weight.data = W.clone()
    r = 2 if A is None else len(A)
    ll.inject(model, ll.LoRAConfig(r=r, lora_alpha=3.0, target_modules=["0"], modules_to_save=None, **options))
    if A is not None and B is not None:
        adapter = model[0].lora["default"]
        adapter.A.data, adapter.B.data = A.clone(), B / adapter.scaling
    return model


def assert_dense(model: nn.Module, found: ll.Analysis) -> None:
    """Every number of an analysis, from matrices that are formed and decomposed."""
    layers = {name: layer for name, layer in lora_layers(model) if "default" in layer.lora}
    assert found.layers.keys() == layers.keys()
    for name, layer in layers.items():
        adapter, said = layer.lora_adapters()["default"], found.layers[name]
        A, B = (factor.detach().double() for factor in adapter.update())
        W = layer.lora_matrix().double()
        delta, merged = adapter.scaling * B @ A, adapter.merged(W).detach()
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        n = int(torch.linalg.matrix_rank(delta))
        U, S, V = U[:, :n], S[:n], V[:n].T
        p = S / S.sum()
        assert said.shape == tuple(delta.shape)
        assert said.singular_values == pytest.approx(S.tolist(), **CLOSE)
        assert said.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), **CLOSE)
        assert said.stable_rank == pytest.approx(float(delta.square().sum() / S[0] ** 2), **CLOSE)
        assert said.norm == pytest.approx(float(delta.norm()), **CLOSE)
        assert said.energy == {k: pytest.approx(float((S[:k] ** 2).sum() / (S**2).sum()), **CLOSE) for k in (1, 2, 4)}
        assert said.norm_A == pytest.approx(float(adapter.A.detach().norm()), **CLOSE)
        assert said.norm_B == pytest.approx(float(adapter.B.detach().norm()), **CLOSE)
        beside = said.weight
        rows, old = merged.norm(dim=1), W.norm(dim=1)
        cosines = nn.functional.cosine_similarity(merged, W, dim=1, eps=1e-300)
        magnitude = getattr(adapter, "magnitude", None)
        rows = rows if magnitude is None else magnitude.detach()
        assert beside.norm == pytest.approx(float(W.norm()), **CLOSE)
        assert beside.drift == pytest.approx(float((merged - W).norm() / W.norm()), **CLOSE)
        assert beside.alignment == pytest.approx(float((W * delta).sum() / W.norm() / delta.norm()), **CLOSE)
        assert beside.projection == pytest.approx(float((U.T @ W @ V).norm()), **CLOSE)
        assert beside.amplification == pytest.approx(float(delta.norm() / (U.T @ W @ V).norm()), **CLOSE)
        assert beside.magnitude_change == pytest.approx(float((rows - old).abs().mean()), **CLOSE)
        assert beside.direction_change == pytest.approx(float((1 - cosines).mean()), rel=1e-9, abs=1e-12)
        values = torch.linalg.svdvals(W)
        assert beside.projection_random == pytest.approx(n * float(W.norm()) / math.sqrt(W.numel()), **CLOSE)
        if said.intruders is not None:
            assert beside.projection_top == pytest.approx(float(values[:n].norm()), **CLOSE)
            new, was = torch.linalg.svd(merged, full_matrices=False).U, torch.linalg.svd(W, full_matrices=False).U
            similarities = (new.T @ was).abs().amax(1)[: len(said.intruders.similarities)]
            assert said.intruders.similarities == pytest.approx(similarities.tolist(), rel=1e-8)
            assert said.intruders.count == int((similarities < said.intruders.epsilon).sum())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_algebra(case, variant):
    model = adapted(CASES[case], variant)
    before = copy.deepcopy(model.state_dict())
    assert_dense(model, ll.analyze(model, weight_svd="exact", epsilon=0.7))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_on_a_packed_base(mode):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5.0, target_modules=["0", "1"], modules_to_save=None, use_dora=True))
    ll.quantize(model, mode)
    model.to("cpu")
    randomise(model)
    found = ll.analyze(model)
    for name, layer in lora_layers(model):
        W, adapter = layer.lora_matrix().double(), layer.lora_adapters()["default"]
        drift = (adapter.merged(W).detach() - W).norm() / W.norm()
        assert found.layers[name].weight.drift == pytest.approx(float(drift), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_other_dtypes_are_summed_in_float32(dtype):
    model = adapted_model(FAMILIES["llama"].make().to(dtype))
    for name, said in ll.analyze(model).layers.items():
        layer = dict(lora_layers(model))[name]
        W, adapter = layer.lora_matrix().double(), layer.lora_adapters()["default"]
        delta = adapter.scaling * (adapter.B.double() @ adapter.A.double()).detach()
        assert said.norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert said.weight.drift == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        assert said.weight.alignment == pytest.approx(float((W * delta).sum() / W.norm() / delta.norm()), abs=1e-6)


def test_an_update_of_rank_2():
    U, V = orthonormal(9, 4), orthonormal(12, 4, 1)
    A, B = torch.cat([V[:, :2], V[:, :2]], dim=1).T, torch.cat([3 * U[:, :2], U[:, :2]], dim=1)
    layer = ll.analyze(linear(torch.randn(9, 12, dtype=torch.float64), A, B)).layers["0"]
    assert layer.r == 4
    assert layer.singular_values == pytest.approx((4.0, 4.0), **CLOSE)
    assert layer.effective_rank == pytest.approx(2.0, **CLOSE)
    assert layer.stable_rank == pytest.approx(2.0, **CLOSE)
    assert layer.energy == {1: pytest.approx(0.5), 2: pytest.approx(1.0), 4: pytest.approx(1.0)}


@pytest.mark.parametrize("k", [0, 3])
def test_an_update_along_a_direction_of_the_weight(k):
    """ΔW = 0.5 u_k v_kᵀ: W has σ_k there, and n random directions have n‖W‖ / √(dk)."""
    U, V, S = orthonormal(10, 10), orthonormal(14, 10, 1), torch.arange(10, 0, -1, dtype=torch.float64)
    W = U * S @ V.T
    said = ll.analyze(linear(W, V[:, k : k + 1].T, 0.5 * U[:, k : k + 1]), weight_svd="exact").layers["0"]
    assert said.weight.projection == pytest.approx(10.0 - k, **CLOSE)
    assert said.weight.amplification == pytest.approx(0.5 / (10 - k), **CLOSE)
    assert said.weight.projection_top == pytest.approx(10.0, **CLOSE)
    assert said.weight.alignment == pytest.approx((10 - k) / float(W.norm()), **CLOSE)
    assert said.weight.drift == pytest.approx(0.5 / float(W.norm()), **CLOSE)
    assert said.intruders.similarities == pytest.approx([1.0] * 10, **CLOSE)  # the directions are W's, the values not
    assert said.intruders.count == 0


def test_a_new_direction_is_an_intruder():
    U, V = orthonormal(10, 10), orthonormal(14, 10, 1)
    W = U[:, :4] * torch.tensor([9.0, 7.0, 5.0, 3.0], dtype=torch.float64) @ V[:, :4].T
    new = (U[:, 4] + U[:, 5]) / 2**0.5  # W is 0 there, and has these directions as two of its own
    model = linear(W, V[:, 6:7].T, 8.0 * new[:, None])
    for directions, among in (("exact", 10), (4, 4)):
        found = ll.analyze(model, weight_svd=directions, top=3).layers["0"].intruders
        assert found.among == among
        assert found.similarities[0] == pytest.approx(1.0)
        assert found.similarities[2] == pytest.approx(1.0)
        assert found.count == (found.similarities[1] < 0.5)
    assert found.similarities[1] == pytest.approx(0.0, abs=1e-9)


def test_random_directions_have_what_is_said_of_them():
    W = torch.randn(20, 30, dtype=torch.float64) * torch.linspace(0.1, 3, 30, dtype=torch.float64)
    said = ll.analyze(linear(W, torch.randn(4, 30).double(), torch.randn(20, 4).double())).layers["0"].weight
    squares = [
        float((orthonormal(20, 4, i).T @ W @ orthonormal(30, 4, 10_000 + i)).square().sum()) for i in range(3000)
    ]
    assert said.projection_random == pytest.approx((sum(squares) / 3000) ** 0.5, rel=0.02)


def test_randomised_decompositions_are_the_exact_ones():
    U, V = orthonormal(80, 60), orthonormal(60, 60, 1)
    W = U * (torch.arange(1, 61, dtype=torch.float64) ** -0.7) @ V.T
    model = linear(W, 0.1 * orthonormal(60, 5, 2).T, orthonormal(80, 5, 3), use_dora=True)
    exact, some = (ll.analyze(model, weight_svd=svd, top=6).layers["0"] for svd in ("exact", 30))
    assert some.intruders.similarities == pytest.approx(exact.intruders.similarities, abs=0.02)
    assert some.weight.projection_top == pytest.approx(exact.weight.projection_top, rel=1e-3)
    assert (some.intruders.among, exact.intruders.among) == (30, 60)
    assert ll.analyze(model, weight_svd=30, seed=1).layers["0"].intruders.among == 30


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:Could not find a config file")
def test_intruders_are_those_that_peft_finds():
    base, generator, lines = FAMILIES["llama"].make(), torch.Generator().manual_seed(1), list[str]()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    reference = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator)
    reference.save_pretrained("adapter")
    reduce_intruder_dimension(reference, logging_sink=lines.append)
    theirs = {
        line.split(": ")[0].removeprefix("base_model.model."): line.split(": ")[-1]
        for line in lines
        if "ntruders" in line
    }
    ll.load_adapter(base, "adapter")
    found = ll.analyze(base, weight_svd="exact").layers
    ours = {name: str(layer.intruders.count or "No intruders") for name, layer in found.items()}
    assert ours == theirs
    assert len(set(ours.values())) > 1


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_an_adapter_beside_itself_and_beside_another_rank(rank):
    A, B = torch.randn(rank, 12, dtype=torch.float64), torch.randn(9, rank, dtype=torch.float64)
    W = torch.randn(9, 12, dtype=torch.float64)
    one = linear(W, A, B)
    other = linear(W, torch.cat([A, torch.randn(2, 12).double()]), torch.randn(9, rank + 2).double())
    said = ll.analyze(one, compare=linear(W, A, B)).comparison.layers["0"]
    ones = torch.linalg.svd(B @ A)
    for grid, M in ((said.left, ones.U[:, :rank]), (said.right, ones.Vh[:rank].T)):
        assert grid.shape == (rank, rank)
        assert torch.allclose(grid.diagonal(), torch.ones(rank, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(grid, subspace_similarity(M, M), atol=1e-10)
    assert said.cosine == pytest.approx(1.0, **CLOSE)
    assert said.distance == pytest.approx(0.0, abs=1e-7)
    said = ll.analyze(one, compare=other).comparison.layers["0"]
    dense = other[0].lora["default"]
    dense = dense.scaling * (dense.B @ dense.A).detach()
    assert said.right.shape == (rank, rank + 2)
    assert said.cosine == pytest.approx(float((B @ A * dense).sum() / (B @ A).norm() / dense.norm()), **CLOSE)
    assert said.distance == pytest.approx(float((B @ A - dense).norm() / (B @ A).norm()), **CLOSE)
    X, Y = torch.linalg.svd(B @ A).Vh[:rank].T, torch.linalg.svd(dense).Vh[: rank + 2].T
    for i in range(1, rank + 1):  # the definition, term by term
        for j in range(1, rank + 3):
            phi = float((X[:, :i].T @ Y[:, :j]).square().sum()) / min(i, j)
            assert float(said.right[i - 1, j - 1]) == pytest.approx(phi, **CLOSE)


def test_orthogonal_adapters():
    W, (U, V) = torch.randn(9, 12, dtype=torch.float64), (orthonormal(9, 6), orthonormal(12, 6, 1))
    one = linear(W, V[:, :3].T, U[:, :3] * torch.tensor([3.0, 2.0, 1.0]))
    said = ll.analyze(one, compare=linear(W, V[:, 3:].T, U[:, 3:])).comparison.layers["0"]
    assert float(said.left.abs().max()) < 1e-20
    assert float(said.right.abs().max()) < 1e-20
    assert said.cosine == pytest.approx(0.0, abs=1e-12)
    assert said.to_dict().keys() == {"name", "cosine", "distance", "left_first", "left_all", "right_first", "right_all"}
    assert len(said.to_dict(grids=True)["left"]) == 3


def test_random_subspaces_are_as_similar_as_is_said():
    grids = [subspace_similarity(orthonormal(40, 5, i), orthonormal(40, 3, 5000 + i)) for i in range(400)]
    largest = torch.maximum(torch.arange(1, 6)[:, None], torch.arange(1, 4)[None])
    assert torch.allclose(torch.stack(grids).mean(0), largest.double() / 40, atol=0.01)
    with pytest.raises(ValueError, match=r"columns of one length, got \(4, 2\) and \(5, 2\)"):
        subspace_similarity(torch.zeros(4, 2), torch.zeros(5, 2))


def test_compared_to_adapters_models_and_files(tmp_path):
    base = FAMILIES["llama"].make()
    model = adapted_model(base, "one", target_modules=["q_proj", "v_proj"])
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, target_modules=["q_proj", "k_proj"]), "two")
    randomise(model)
    ll.save_adapter(model, tmp_path / "two", "two")
    by_name = ll.analyze(model, "one", compare="two").comparison
    for compare, adapter_name in ((tmp_path / "two", None), (str(tmp_path / "two"), "two"), (model, "two")):
        other = ll.analyze(model, "one", compare=compare, compare_adapter=adapter_name).comparison
        for name, layer in by_name.layers.items():
            assert torch.allclose(other.layers[name].left, layer.left, rtol=1e-12)
            assert torch.allclose(other.layers[name].right, layer.right, rtol=1e-12)
            assert other.layers[name].cosine == pytest.approx(layer.cosine, rel=1e-12)
    assert [name.rpartition(".")[2] for name in by_name.layers] == ["q_proj", "q_proj"]
    assert [name.rpartition(".")[2] for name in by_name.only] == ["v_proj", "v_proj"]
    assert [name.rpartition(".")[2] for name in by_name.only_other] == ["k_proj", "k_proj"]
    outer = nn.ModuleDict({"net": model})  # names of the folder are those of the model in it
    assert ll.analyze(outer, "one", compare=tmp_path / "two").comparison.layers.keys() == {
        f"net.{name}" for name in by_name.layers
    }
    inner = ll.analyze(model, "one", compare=outer, compare_adapter="two").comparison
    assert inner.layers.keys() == by_name.layers.keys()
    text = str(ll.analyze(model, "one", compare="two"))
    assert "beside two:" in text
    assert "only one is on model.layers.0.self_attn.v_proj" in text


def test_together_by_module_and_in_blocks():
    model = adapted_model(FAMILIES["t5"].make(), target_modules=["q", "wo"], use_dora=True)
    found = ll.analyze(model)
    first = found.layers["encoder.block.0.layer.0.SelfAttention.q"]
    assert (first.block, first.module) == ("encoder.block.0", "layer.0.SelfAttention.q")
    together = found.by_module()[first.module]
    mates = [layer for layer in found.layers.values() if layer.module == first.module]
    assert together["layers"] == len(mates) == 4
    assert together["norm"] == pytest.approx(sum(m.norm**2 for m in mates) ** 0.5)
    assert together["effective_rank"] == pytest.approx(sum(m.effective_rank for m in mates) / 4)
    moved = sum((m.weight.drift * m.weight.norm) ** 2 for m in mates) / sum(m.weight.norm**2 for m in mates)
    assert together["drift"] == pytest.approx(moved**0.5)
    assert together["intruders"] is None
    assert sum(module["layers"] for module in found.by_module().values()) == len(found.layers)
    alone = ll.analyze(nn.Sequential(model.encoder.block[0].layer[0].SelfAttention.q))
    assert (alone.layers["0"].block, alone.layers["0"].module) == ("", "0")


def test_as_data():
    model = adapted_model(FAMILIES["llama"].make(), target_modules=["q_proj"])
    found = ll.analyze(model, weight_svd=8, compare="default")
    read = json.loads(json.dumps(found.to_dict(grids=True), allow_nan=False))
    assert read["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert read["layers"][0]["singular_values"] == list(found.layers["model.layers.0.self_attn.q_proj"].singular_values)
    assert read["layers"][1]["weight"]["drift"] > 0
    assert len(read["comparison"]["layers"][0]["right"]) == 4
    assert "right" not in found.to_dict()["comparison"]["layers"][0]
    row = found.rows()[0]
    assert (row["shape"], row["module"], row["right_all"]) == ("32x32", "self_attn.q_proj", pytest.approx(1.0))
    assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())


def test_as_a_data_frame(monkeypatch):
    found = ll.analyze(adapted_model(FAMILIES["llama"].make(), target_modules=["q_proj"]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ll.UnsupportedError, match="pip install pandas"):
        found.to_dataframe()
    monkeypatch.undo()
    pytest.importorskip("pandas")
    frame = found.to_dataframe()
    assert list(frame["name"]) == list(found.layers)
    assert frame["drift"].tolist() == [layer.weight.drift for layer in found.layers.values()]


def test_nothing_learnt_yet():
    model = FAMILIES["llama"].make()
    ll.inject(model, ll.LoRAConfig(r=4, use_dora=True))
    found = ll.analyze(model, weight_svd=4, compare="default")
    for layer in found.layers.values():
        assert (layer.norm, layer.effective_rank, layer.stable_rank, layer.singular_values) == (0, 0, 0, ())
        assert (layer.weight.amplification, layer.weight.alignment) == (None, None)
        assert layer.weight.drift == pytest.approx(0, abs=1e-6)
        assert layer.weight.direction_change == 0
    assert {layer.cosine for layer in found.comparison.layers.values()} == {None}
    json.dumps(found.to_dict(), allow_nan=False)
    assert "lora on 14 layers" in str(found).replace("dora", "lora")


def test_rows_and_weights_that_are_0():
    W = torch.randn(6, 8, dtype=torch.float64)
    W[2] = 0
    A, B = torch.randn(2, 8, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    said = ll.analyze(linear(W, A, B, use_dora=True)).layers["0"].weight
    kept = [row for row in range(6) if row != 2]
    cosines = nn.functional.cosine_similarity(W[kept], (W + B @ A)[kept], dim=1)
    assert said.direction_change == pytest.approx(float((1 - cosines).sum()) / 6, rel=1e-9)
    said = ll.analyze(linear(torch.zeros_like(W), A, B)).layers["0"].weight
    assert (said.drift, said.amplification, said.alignment) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_svd": 0}, "weight_svd must be a number of directions, 'exact' or None, got 0"),
        ({"weight_svd": "all"}, "weight_svd must be a number of directions"),
        ({"weight_svd": 4, "weights": False}, "there are none to read"),
        ({"top": 0, "epsilon": 1.5, "seed": -1}, "3 problems:"),
        ({"compare_adapter": "b"}, "compare_adapter='b' is one of what is given to compare, and that is nothing"),
        ({"compare": "defalt"}, "compare='defalt' is no adapter of the model, and no file. Did you mean 'default'"),
        ({"adapter_name": "defalt"}, "there is no adapter 'defalt'. Did you mean 'default'"),
        ({"compare": nn.Sequential(nn.Linear(2, 2))}, "there is no adapter 'default'"),
        ({"compare": linear(torch.randn(5, 5).double())}, "0 is 9x12 in the one and 5x5 in the other"),
        ({"compare": nn.ModuleDict({"a": linear(torch.randn(9, 12).double())[0]})}, "no layer in common"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ll.ConfigError) as caught:
        ll.analyze(linear(torch.randn(9, 12).double()), **options)
    assert message in str(caught.value)


def test_bad_states():
    model = linear(torch.randn(9, 12).double(), torch.randn(2, 12).double(), torch.randn(9, 2).double())
    before = ll.analyze(model)
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match=r"merged into 0: call ll\.unmerge before they are analysed"):
        ll.analyze(model)
    ll.unmerge(model)
    assert ll.analyze(model) == before
    model[0].lora["default"].A.data[0, 0] = float("nan")
    with pytest.raises(ll.ConfigError, match="holds NaN or infinite values on 0"):
        ll.analyze(model)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4))
    ll.inject(meta, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ConfigError, match="has no values yet on 0"):
        ll.analyze(meta)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ll.analyze(linear(torch.randn(9, 12).double()), compare="./none")


def test_without_weights():
    model = adapted_model(FAMILIES["llama"].make())
    found = ll.analyze(model, weights=False)
    assert {layer.weight for layer in found.layers.values()} == {None}
    assert "drift" not in str(found)


def test_a_stack_of_experts_is_told_one_by_one(tmp_path):
    model = FAMILIES["mixtral"].make().double()
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "modules_to_save": None}
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, **options))
    randomise(model)
    found = ll.analyze(model, weight_svd="exact").layers
    name, layer = next((name, layer) for name, layer in lora_layers(model) if name.endswith("gate_up_proj"))
    adapter, W = layer.lora["default"], layer.lora_matrix()
    merged = adapter.merged(W).detach()
    assert len(found) == 2 * (1 + len(W))
    for i in range(len(W)):
        said, S = found[f"{name}[{i}]"], torch.linalg.svdvals(merged[i] - W[i])[:2]
        assert said.module == "mlp.experts.gate_up_proj"
        assert said.singular_values == pytest.approx(S.tolist(), rel=1e-9)
        assert said.weight.drift == pytest.approx(float((merged[i] - W[i]).norm() / W[i].norm()), rel=1e-9)
    ll.save_adapter(model, tmp_path / "a")
    files = analyze_files(tmp_path / "a").layers.values()
    norms = sorted(layer.norm for layer in files)
    assert norms == pytest.approx(sorted(layer.norm for layer in found.values()), rel=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_started_with_a_part_of_the_weight_and_did_not_move(init):
    """Its two halves cancel, but for rounding, which is no spectrum."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 32)).double()
    ll.inject(model, ll.LoRAConfig(r=8, lora_alpha=12, init_lora_weights=init, modules_to_save=None))
    for layer in ll.analyze(model).layers.values():
        assert (layer.norm, layer.effective_rank, layer.stable_rank) == (0, 0, 0)
    assert not any(measure([layer.lora["default"] for _, layer in lora_layers(model)])["delta_norm"])


def test_rows_of_tokens_alone_are_no_product():
    model = FAMILIES["llama"].make()
    ll.inject(model, ll.LoRAConfig(target_modules=[], trainable_token_indices=[3, 4], modules_to_save=None))
    with pytest.raises(ll.UnsupportedError, match="adapter 'default' of .* is rows of tokens alone"):
        ll.analyze(model)
