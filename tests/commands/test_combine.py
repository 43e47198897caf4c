"""``combine``: from files alone, the folder that ``combine_adapters`` and ``save_adapter`` would give on the base."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.commands.files import adapted, assert_same_files, fails, fitted, run, tensors
from tests.helpers.families import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
KINDS = {
    "cat": ("llama", [{}, {"r": 2}], []),
    "cat-three": ("llama", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}], []),
    "svd": ("llama", [{}, {}], ["--method", "svd", "--rank", "3"]),
    "linear": ("llama", [{}, {}], ["--method", "linear"]),
    "ties": ("llama", [{}, {}], ["--method", "ties", "--density", "0.3"]),
    "ties-rank": ("llama", [{}, {"r": 2}], ["--method", "ties", "--rank", "2"]),
    "dare_linear": ("llama", [{}, {}], ["--method", "dare_linear", "--seed", "5"]),
    "dare_ties": ("llama", [{}, {}], ["--method", "dare_ties", "--rank", "2", "--seed", "5"]),
    "pissa": ("llama", [{"init_lora_weights": "pissa"}, {}], []),
    "in-full": ("llama", [{"modules_to_save": ["1.input_layernorm"]}, {"bias": "all"}], []),
    "head": ("bert", [{"modules_to_save": ["classifier"]}, {"target_modules": ["query"], "modules_to_save": None}], []),
    "gpt2-conv1d": ("gpt2", [{}, {}], []),
    "biases": ("opt", [{"bias": "all"}, {}], []),
    "convolutions": (
        "vit",
        [{"target_modules": ["projection", "q_proj"]}, {"modules_to_save": None}],
        ["--method", "svd", "--rank", "4"],
    ),
    "tied": ("qwen2-tied", [{}, {"target_modules": ["embed_tokens"]}], []),
}
WEIGHTS = {"one": 0.7, "two": -0.3, "three": 1.5}


def saved(folder, family, options):
    """Adapters of one base, each in a folder, and the base."""
    base = FAMILIES[family].make()
    for i, (name, own) in enumerate(zip(WEIGHTS, options, strict=False)):
        ll.save_adapter(adapted(base, name, seed=3 + i, **own), folder / name, name)
    return base, list(WEIGHTS)[: len(options)]


@pytest.mark.filterwarnings("ignore:bias=.* trains nothing")
@pytest.mark.parametrize(("family", "options", "arguments"), KINDS.values(), ids=KINDS)
def test_it_is_what_the_model_gives(tmp_path, capsys, family, options, arguments):
    base, names = saved(tmp_path, family, options)
    model = copy.deepcopy(base)
    for name in names:
        ll.load_adapter(model, tmp_path / name, allow_base_mismatch=True)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    report = ll.combine_adapters(
        model,
        {name: WEIGHTS[name] for name in names},
        "both",
        given.get("--method", "cat"),
        int(given["--rank"]) if "--rank" in given else None,
        density=float(given["--density"]) if "--density" in given else None,
        seed=int(given.get("--seed", 0)),
    )
    ll.save_adapter(model, tmp_path / "expected", "both")
    sources = [f"{tmp_path / name}:{WEIGHTS[name]}" for name in names]
    capsys.readouterr()
    run("combine", tmp_path / "out", *sources, *arguments, "--adapter-name", "both")
    assert_same_files(tmp_path / "expected", tmp_path / "out")
    said = capsys.readouterr().out
    assert f" on {len(report.layers)} layers, rank" in said
    assert ("the reduction of rank lost" in said) == any(layer.error > 0 for layer in report.layers.values())
    again = copy.deepcopy(base)
    ll.load_adapter(again, tmp_path / "out", allow_base_mismatch=True)
    assert list(ll.adapters(again)) == ["both"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_the_dtype_of_the_adapters(tmp_path, dtype):
    base, model = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    for i, name in enumerate(("one", "two")):
        adapter = adapted(base, name, seed=3 + i)
        for _, layer in lora_layers(adapter):
            layer.lora[name].master_dtype = dtype
            layer.lora[name].to(dtype)
        ll.save_adapter(adapter, tmp_path / name, name)
        ll.load_adapter(model, tmp_path / name)
    ll.combine_adapters(model, {"one": 0.7, "two": -0.3}, "both", "svd", 3)
    ll.save_adapter(model, tmp_path / "expected", "both")
    sources = [f"{tmp_path / 'one'}:0.7", f"{tmp_path / 'two'}:-0.3"]
    run("combine", tmp_path / "out", *sources, "--method", "svd", "--rank", "3", "--adapter-name", "both")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {dtype}
    assert_same_files(tmp_path / "expected", tmp_path / "out")


def test_adapters_of_peft(tmp_path):
    """They say less of their base: names stay whole, so that they match nothing else."""
    base = FAMILIES["gpt2"].make().eval()
    twins = []
    for name in ("one", "two"):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], layers_to_transform=[1], fan_in_fan_out=True)
        twin = get_peft_model(copy.deepcopy(base), config).eval()
        for key, parameter in twin.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
        twin.save_pretrained(tmp_path / name)
        twins.append(twin)
    run("combine", tmp_path / "out", f"{tmp_path / 'one'}:0.5", tmp_path / "two")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.1.attn.c_attn"]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 8, True)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["lightning_lora"])
    assert "base" not in entry
    assert entry["adapter_name"] == "combined"
    batch = FAMILIES["gpt2"].batch(base)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    ours = copy.deepcopy(base)
    ll.load_adapter(ours, tmp_path / "out")
    weight = base.transformer.h[1].attn.c_attn.weight
    deltas = [t.base_model.model.transformer.h[1].attn.c_attn.get_delta_weight("default") for t in twins]
    weight.data += 0.5 * deltas[0] + deltas[1]
    for model in (theirs, ours):
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=1e-5, atol=1e-5)


def test_checkpoints_and_folders_together(tmp_path):
    fitted(tmp_path, "llama")
    base = FAMILIES["llama"].make()
    ll.save_adapter(adapted(base), tmp_path / "a")
    run("export", tmp_path / "run.ckpt", tmp_path / "exported")
    run("combine", tmp_path / "one", f"{tmp_path / 'run.ckpt'}:2", tmp_path / "a")
    run("combine", tmp_path / "two", f"{tmp_path / 'exported'}:2", tmp_path / "a")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_paths_with_colons(tmp_path):
    base = FAMILIES["llama"].make()
    for name in ("a:b", "a:0.5", "c"):
        ll.save_adapter(adapted(base), tmp_path / name)
    for source, weight in (("a:b", 1.0), ("a:b:0.25", 0.25), ("a:0.5", 1.0), ("a:0.5:-2", -2.0), ("c:1e-1", 0.1)):
        run("combine", tmp_path / "out", tmp_path / source, "--overwrite")
        B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        expected = tensors(tmp_path / "c")[B] * (weight * 1.5)
        torch.testing.assert_close(tensors(tmp_path / "out")[B], expected)


def test_what_is_refused(tmp_path, capsys):
    base, _ = saved(tmp_path, "llama", [{}, {"r": 2}])
    ll.save_adapter(adapted(base, use_dora=True), tmp_path / "dora")
    torch.manual_seed(9)
    ll.save_adapter(adapted(FAMILIES["llama"].build()), tmp_path / "other")
    ll.save_adapter(adapted(FAMILIES["gpt2"].make()), tmp_path / "gpt2")
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"

    said = fails(1, capsys, "combine", out, one, tmp_path / "dora")
    assert "is a DoRA adapter, whose update depends on the weights of the base" in said
    assert "ll.to_lora" in said
    said = fails(1, capsys, "combine", out, one, tmp_path / "other")
    assert "are of different bases" in said
    run("combine", out, one, tmp_path / "other", "--allow-base-mismatch")
    said = fails(1, capsys, "combine", tmp_path / "x", one, tmp_path / "gpt2", tmp_path / "other")
    assert "2 problems" in said
    said = fails(2, capsys, "combine", tmp_path / "x", f"{one}:0", f"{two}:nan", "--density", 7, "--method", "cta")
    assert "4 problems" in said
    assert "method must be one of" in said
    assert "Did you mean 'cat'" in said
    assert "density must be a number in (0, 1], got 7.0" in said
    assert len(re.findall("must be a finite number and not 0", said)) == 2
    assert "density=0.3 is of no use to method='cat'" in fails(
        2, capsys, "combine", tmp_path / "x", one, two, "--density", 0.3
    )
    assert "'svd' needs a rank" in fails(2, capsys, "combine", tmp_path / "x", one, two, "--method", "svd")
    assert "needs equal ranks" in fails(2, capsys, "combine", tmp_path / "x", one, two, "--method", "linear")
    assert "adapter_name='a b' can't be used" in fails(
        2, capsys, "combine", tmp_path / "x", one, "--adapter-name", "a b"
    )
    assert "must be a whole number of at least 1" in fails(2, capsys, "combine", tmp_path / "x", one, "--rank", 0)
    assert "does not exist" in fails(2, capsys, "combine", tmp_path / "x", one, tmp_path / "none:0.5")
    assert "FOLDER:WEIGHT" in fails(2, capsys, "combine", tmp_path / "x")
    assert "holds no adapter_config.json" in fails(1, capsys, "combine", tmp_path / "x", tmp_path)
    assert not (tmp_path / "x").exists()


def test_parts_of_layers(tmp_path, capsys):
    """In a folder they are one adapter with zeros, which are no entries of any: 'ties' would keep more of the others."""
    base, names = saved(tmp_path, "phi3", [{"target_modules": ["qkv_proj.q", "qkv_proj.v"]}] * 2)
    sources = [f"{tmp_path / name}:{WEIGHTS[name]}" for name in names]
    for method in ("linear", "ties", "dare_linear", "dare_ties"):
        said = fails(1, capsys, "combine", tmp_path / "out", *sources, "--method", method)
        assert "has adapters on parts of model.layers.0.self_attn.qkv_proj" in said
    run("combine", tmp_path / "out", *sources)
    model, again = copy.deepcopy(base), copy.deepcopy(base)
    for name in names:
        ll.load_adapter(model, tmp_path / name)
    ll.set_adapter(model, {name: WEIGHTS[name] for name in names})
    ll.load_adapter(again, tmp_path / "out")
    batch = FAMILIES["phi3"].batch(base)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_is_combined_is_not_written_over(tmp_path, capsys):
    saved(tmp_path, "llama", [{}, {}])
    one, two = tmp_path / "one", tmp_path / "two"
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    (tmp_path / "link").symlink_to(two)
    for out, source in ((two, two), (tmp_path / "link", two), (one / ".." / "two", two / "adapter_model.safetensors")):
        said = fails(2, capsys, "combine", out, one, f"{source}:0.5")
        assert f"{source} would be written over: give another folder than {out}" in said
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


def test_damaged_adapters(tmp_path, capsys):
    base = FAMILIES["llama"].make()
    ll.save_adapter(adapted(base), tmp_path / "a")
    model = adapted(base)
    ll.save_adapter(model, tmp_path / "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "SHA-256 differs" in fails(1, capsys, "combine", tmp_path / "x", tmp_path / "a", tmp_path / "b")
    weights.write_bytes(weights.read_bytes()[:-99])
    assert "is damaged" in fails(1, capsys, "combine", tmp_path / "x", tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "x").exists()


def test_the_same_adapter_twice(tmp_path):
    ll.save_adapter(adapted(FAMILIES["llama"].make()), tmp_path / "a")
    run("combine", tmp_path / "out", f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'a'}:0.5", "--method", "svd", "--rank", "4")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "a")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    product = found[name.format("B")] @ found[name.format("A")]
    torch.testing.assert_close(product, 1.5 * expected[name.format("B")] @ expected[name.format("A")])


def test_adapters_of_bases_with_other_names(tmp_path, capsys):
    """Where no fingerprint is known, names are all there is to tell."""
    base = FAMILIES["llama"].make()
    for name, of in (("one", "meta/llama"), ("two", "other/mistral"), ("three", None)):
        get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / name)
        config = json.loads((file := tmp_path / name / "adapter_config.json").read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": of}))
    folders = [tmp_path / name for name in ("one", "two")]
    said = fails(1, capsys, "combine", tmp_path / "out", *folders)
    assert "different bases are named: " in said
    assert "one of meta/llama" in said
    assert "two of other/mistral; --allow-base-mismatch allows it" in said
    assert not (tmp_path / "out").exists()
    run("combine", tmp_path / "out", *folders, "--allow-base-mismatch")
    run("combine", tmp_path / "others", tmp_path / "one", tmp_path / "three")


def test_an_adapter_in_the_way_is_written_over_only_if_asked(tmp_path, capsys):
    """The first argument is the folder to write: an adapter named there first would be lost."""
    _, (one, two) = saved(tmp_path, "llama", [{}, {}])
    before = tensors(tmp_path / one)
    said = fails(2, capsys, "combine", tmp_path / one, tmp_path / two)
    assert (
        f"{tmp_path / 'one'}, where the new adapter goes, already holds an adapter: give another folder, or --overwrite"
        in said
    )
    assert all(torch.equal(value, before[key]) for key, value in tensors(tmp_path / one).items())
    run("combine", tmp_path / one, f"{tmp_path / two}:0.7", "--overwrite")
    assert not all(torch.equal(value, before[key]) for key, value in tensors(tmp_path / one).items())


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_layer_that_lacks_a_matrix_is_named(tmp_path, capsys, part):
    """Of a folder without checksums, as PEFT writes it."""
    for name in "ab":
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        get_peft_model(FAMILIES["llama"].make(), config).save_pretrained(tmp_path / name)
    file = tmp_path / "b" / "adapter_model.safetensors"
    values = tensors(tmp_path / "b")
    del values[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"]
    save_file(values, file, {"format": "pt"})
    said = fails(1, capsys, "combine", tmp_path / "x", tmp_path / "a", tmp_path / "b")
    assert "model.layers.0.self_attn.q_proj has no matrices A and B" in said
    assert not (tmp_path / "x").exists()
