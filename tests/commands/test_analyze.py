"""``analyze``: what files tell alone and with their base, in text and in JSON, and what is wrong with them."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from tests.commands.files import adapted, fails, fitted, run
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


def told(capsys, *arguments) -> dict:
    capsys.readouterr()
    run("analyze", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def assert_same(found: dict, expected: ll.Analysis, prefix: str = "") -> None:
    """What files tell is what the model tells."""
    layers = {layer["name"].removeprefix(prefix): layer for layer in found["layers"]}
    assert layers.keys() == {name.removeprefix(prefix) for name in expected.layers}
    for name, layer in expected.layers.items():
        said = layers[name.removeprefix(prefix)]
        assert said["singular_values"] == pytest.approx(layer.singular_values, rel=1e-9)
        assert said["effective_rank"] == pytest.approx(layer.effective_rank, rel=1e-9)
        assert (said["r"], said["scaling"], said["shape"]) == (layer.r, pytest.approx(layer.scaling), [*layer.shape])
        if said["weight"] is not None:
            assert said["weight"].pop("projection_top") is layer.weight.projection_top is None
            expects = {key: value for key, value in vars(layer.weight).items() if key != "projection_top"}
            assert said["weight"] == pytest.approx(expects, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("qwen2-tied", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"], "use_dora": True}),
        ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True, "modules_to_save": None}),
        ("bert", {}),
    ],
)
def test_a_folder_alone_and_with_its_base(tmp_path, capsys, family, options):
    base = FAMILIES[family].make()
    model = adapted(base, **options)
    base.save_pretrained(tmp_path / "base")
    ll.save_adapter(model, tmp_path / "a")
    expected = ll.analyze(model)
    alone, both = told(capsys, tmp_path / "a"), told(capsys, tmp_path / "a", "--base", tmp_path / "base")
    assert_same(alone, expected)
    assert_same(both, expected)
    assert {layer["weight"] for layer in alone["layers"]} == {None}
    assert all(layer["weight"]["drift"] > 0 for layer in both["layers"])
    assert alone["variant"] == ("dora" if options.get("use_dora") else "lora")
    assert [note[:15] for note in both["notes"]] == (["trained in full"] if family == "bert" else [])


def test_a_checkpoint_and_its_adapters(tmp_path, capsys):
    module = fitted(tmp_path, "bert", use_dora=True)
    ll.save_adapter(module.net, tmp_path / "a")
    expected = ll.analyze(module)
    module.net.config.save_pretrained(tmp_path / "base")
    FAMILIES["bert"].make().save_pretrained(tmp_path / "base")
    assert_same(told(capsys, tmp_path / "run.ckpt"), expected, "net.")
    found = told(capsys, tmp_path / "run.ckpt", "--compare", tmp_path / "a", "--base", tmp_path / "base")
    assert_same(found, expected, "net.")
    compared = found["comparison"]["layers"]
    assert len(compared) == len(expected.layers)
    assert [(layer["cosine"], layer["right_all"]) for layer in compared] == [pytest.approx((1, 1))] * len(compared)
    assert told(capsys, tmp_path / "a", "--compare", tmp_path / "run.ckpt")["comparison"]["only"] == []
    told(capsys, tmp_path / "run.ckpt", "--out", tmp_path / "figures")
    figures = ("singular_values", "norm", "effective_rank", "energy_1")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{n}.{e}" for n in figures for e in ("png", "svg")
    }


def test_two_adapters_of_one_checkpoint(tmp_path, capsys):
    saver = ModelCheckpoint(tmp_path, filename="run")
    adapters = [ll.LoRA(r=r, target_modules=["q_proj"], adapter_name=name) for name, r in (("one", 4), ("two", 2))]
    module = Wrapped(FAMILIES["llama"].make)
    trainer(*adapters, saver).fit(module, one_batch(FAMILIES["llama"].batch(module.net)))
    path = tmp_path / "run.ckpt"
    assert "holds the adapters one, two. Say which" in fails(1, capsys, "analyze", path)
    found = told(capsys, path, "--adapter", "one", "--compare", path, "--compare-adapter", "two")
    assert_same(found, ll.analyze(module, "one"))
    expected = ll.analyze(module, "one", compare="two").comparison.layers
    cosines = {layer["name"]: pytest.approx(layer["cosine"], rel=1e-6) for layer in found["comparison"]["layers"]}
    assert {name: layer.cosine for name, layer in expected.items()} == cosines


def test_in_words_with_figures(tmp_path, capsys):
    base = FAMILIES["llama"].make()
    base.save_pretrained(tmp_path / "base")
    ll.save_adapter(adapted(base, target_modules=["q_proj"]), tmp_path / "a")
    ll.save_adapter(adapted(base, seed=9, r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "b")
    capsys.readouterr()
    arguments = ["--base", tmp_path / "base", "--compare", tmp_path / "b", "--weight-svd", "8", "--epsilon", "0.9"]
    run("analyze", tmp_path / "a", *arguments, "--html", tmp_path / "a.html")
    written = capsys.readouterr()
    assert f"adapter default of {tmp_path / 'a'}: lora on 2 layers, rank 4" in written.out
    header = written.out.split("\n\n")[1].splitlines()[0].split("  ")
    words = ["module", "layers", "|dW|", "eff. rank", "drift", "amplif.", "dM", "dD", "intruders"]
    assert [word for word in map(str.strip, header) if word in words] == words
    assert f"beside {tmp_path / 'b'}:" in written.out
    assert "is on model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj" in written.out
    assert written.err == f"written: {tmp_path / 'a.html'}\n"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_bad_input(tmp_path, capsys):
    base = FAMILIES["llama"].make()
    base.save_pretrained(tmp_path / "base")
    ll.save_adapter(adapted(base), tmp_path / "a")
    ll.save_adapter(adapted(FAMILIES["gpt2"].make()), tmp_path / "gpt2")
    other = FAMILIES["llama"].make()
    for parameter in other.parameters():
        parameter.data *= 1.1
    other.save_pretrained(tmp_path / "other")
    a, base_folder = tmp_path / "a", tmp_path / "base"
    assert "does not exist" in fails(2, capsys, "analyze", tmp_path / "none")
    assert "is a file: give a folder" in fails(2, capsys, "analyze", a, "--base", a / "adapter_config.json")
    assert "holds no config.json" in fails(1, capsys, "analyze", a, "--base", a)
    assert "must be a number of directions or 'exact', got 'all'" in fails(
        2, capsys, "analyze", a, "--weight-svd", "all"
    )
    assert "there are none to read: give the base" in fails(2, capsys, "analyze", a, "--weight-svd", "4")
    assert "epsilon must be a cosine" in fails(2, capsys, "analyze", a, "--epsilon", "2")
    assert "has no adapter 'b'" in fails(2, capsys, "analyze", a, "--adapter", "b")
    assert "has no adapter 'b'" in fails(2, capsys, "analyze", a, "--compare", a, "--compare-adapter", "b")
    assert "and that is nothing" in fails(2, capsys, "analyze", a, "--compare-adapter", "b")
    assert "no layer in common" in fails(2, capsys, "analyze", a, "--compare", tmp_path / "gpt2")
    assert "the model has no transformer.h" in fails(1, capsys, "analyze", tmp_path / "gpt2", "--base", base_folder)
    assert "(--allow-base-mismatch)" in fails(1, capsys, "analyze", a, "--base", tmp_path / "other")
    assert "is a file: give a folder" in fails(2, capsys, "analyze", a, "--out", a / "adapter_config.json")
    told(capsys, a, "--base", tmp_path / "other", "--allow-base-mismatch")
    weights = a / "adapter_model.safetensors"
    held = load_file(weights)
    held[next(iter(held))][0, 0] = float("inf")
    save_file(held, weights)
    assert "holds NaN or infinite values" in fails(1, capsys, "analyze", a)


def test_what_peft_took_out_of_the_weights_is_not_guessed(tmp_path, capsys):
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(FAMILIES["llama"].make(), config).save_pretrained(tmp_path / "a")
    said = fails(1, capsys, "analyze", tmp_path / "a")
    assert "init_lora_weights='pissa' took a part out of each weight" in said
    assert "call ll.analyze(model)" in said
    model = FAMILIES["llama"].make()
    ll.load_adapter(model, tmp_path / "a")
    assert all(layer.norm < 1e-5 for layer in ll.analyze(model).layers.values())


def test_an_adapter_that_peft_wrote(tmp_path, capsys):
    model = get_peft_model(FAMILIES["llama"].make(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "a")
    found = told(capsys, tmp_path / "a")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert found["adapter_name"] == "default"
    assert found["layers"][1]["norm_A"] == pytest.approx(
        float(layer.lora_A["default"].weight.detach().norm()), rel=1e-6
    )
    delta = layer.get_delta_weight("default").detach().double()
    assert found["layers"][1]["singular_values"] == pytest.approx(torch.linalg.svdvals(delta)[:3].tolist(), rel=1e-5)
