"""``inspect``: what files hold, in text and in JSON, and what is wrong with them."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from lightning_lora.comparators import Bottleneck
from lightning_lora.layers import lora_layers
from tests.commands.files import adapted, fails, fitted, run
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
KEYS = {"path", "format", "bytes", "step", "epoch", "versions", "checksums", "base", "adapters"}
ADAPTER_KEYS = {"name", "kind", "ranks", "modules_to_save", "config", "parameters", "bytes", "layers", "in_full"}
LAYER_KEYS = {
    "name", "r", "lora_alpha", "scaling", "norm_A", "norm_B", "norm_update", "norm_magnitude", "parameters", "bytes",
}  # fmt: skip


def told(capsys, path) -> dict:
    capsys.readouterr()
    run("inspect", path, "--json")
    written = capsys.readouterr()
    assert written.err == ""
    return json.loads(written.out)


def assert_describes(found: dict, model: torch.nn.Module, prefix: str = "") -> None:
    """The layers of a report are those of a model, with the norms of their real updates."""
    adapters = {n.removeprefix(prefix): layer.lora_adapters()["default"] for n, layer in lora_layers(model)}
    assert {layer["name"].removeprefix(prefix) for layer in found["layers"]} == adapters.keys()
    for layer in found["layers"]:
        assert layer.keys() == LAYER_KEYS
        adapter = adapters[layer["name"].removeprefix(prefix)]
        A, B = (factor.detach().double() for factor in adapter.update())
        assert layer["norm_update"] == pytest.approx(float((adapter.scaling * B @ A).norm()), rel=1e-4)
        assert layer["norm_A"] == pytest.approx(float(adapter.A.detach().norm()), rel=1e-5)
        assert layer["norm_B"] == pytest.approx(float(adapter.B.detach().norm()), rel=1e-5)
        assert (layer["r"], layer["scaling"]) == (adapter.r, pytest.approx(adapter.scaling))
        magnitude = getattr(adapter, "magnitude", None)
        norm = None if magnitude is None else pytest.approx(float(magnitude.detach().norm()), rel=1e-5)
        assert layer["norm_magnitude"] == norm


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True, "modules_to_save": None}),
        ("bert", {}),
    ],
)
def test_a_folder(tmp_path, capsys, family, options):
    model = adapted(FAMILIES[family].make(), **options)
    ll.save_adapter(model, tmp_path / "a", step=7)
    found = told(capsys, tmp_path / "a")
    assert found.keys() == KEYS
    assert (found["format"], found["step"], found["checksums"]) == ("peft", 7, "verified")
    assert found["base"].keys() == {"name", "sha256", "tensors", "quantization"}
    (adapter,) = found["adapters"]
    assert adapter.keys() == ADAPTER_KEYS
    assert adapter["kind"] == ("dora" if options.get("use_dora") else "lora")
    assert_describes(adapter, model)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert adapter["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert adapter["bytes"] == 4 * adapter["parameters"]
    names = [part["name"] for part in adapter["in_full"]]
    assert names == (["classifier.bias", "classifier.weight"] if family == "bert" else [])
    assert adapter["modules_to_save"] == (["classifier"] if family == "bert" else [])
    assert told(capsys, tmp_path / "a" / "adapter_model.safetensors") == found


def test_a_checkpoint(tmp_path, capsys):
    module = fitted(tmp_path, "bert", use_dora=True)
    found = told(capsys, tmp_path / "run.ckpt")
    assert found.keys() == KEYS
    assert (found["format"], found["step"], found["epoch"], found["checksums"]) == ("checkpoint", 2, 0, "none")
    assert found["versions"].keys() == {"lightning-lora", "torch", "lightning"}
    assert found["base"]["quantization"] is None
    assert found["base"]["tensors"] > 30
    (adapter,) = found["adapters"]
    assert (adapter["name"], adapter["kind"], adapter["ranks"]) == ("default", "dora", [4])
    assert adapter["config"]["lora_alpha"] == 6
    assert_describes(adapter, module)
    assert {part["name"]: part["shape"] for part in adapter["in_full"]} == {
        "net.classifier.weight": [3, 32],
        "net.classifier.bias": [3],
    }


def test_in_words(tmp_path, capsys):
    fitted(tmp_path, "bert", quantization="nf4-dq")
    run("inspect", tmp_path / "run.ckpt")
    said = capsys.readouterr().out
    for words in (
        "run.ckpt: checkpoint, ",
        "step 2, epoch 0",
        "base: trained in nf4-dq, ",
        "integrity: all values are finite; no checksums",
        "adapter default: lora on 13 layers, rank 4, ",
        "trained in full: net.classifier.weight 3x32",
    ):
        assert words in said, words
    header, *rows = said.split("rank 4, ")[1].splitlines()[1:15]
    assert header.split() == ["layer", "r", "scale", "|A|", "|B|", "|dW|", "|m|", "parameters"]
    assert len({len(row) for row in [header, *rows]}) == 1
    ll.save_adapter(adapted(FAMILIES["llama"].make()), tmp_path / "a")
    run("inspect", tmp_path / "a")
    assert "checksums verified" in capsys.readouterr().out


def test_a_folder_that_peft_wrote(tmp_path, capsys):
    model = get_peft_model(FAMILIES["llama"].make(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    found = told(capsys, tmp_path / "a")
    assert (found["checksums"], found["step"], found["base"]) == ("none", None, None)
    assert found["versions"].keys() <= {"peft"}
    assert [layer["norm_update"] for layer in found["adapters"][0]["layers"]] == [0.0, 0.0]
    run("inspect", tmp_path / "a")
    said = capsys.readouterr().out
    assert "base: not known" in said
    assert "adapter (not named): lora on 2 layers, rank 3" in said


def test_damage(tmp_path, capsys):
    fitted(tmp_path, "llama")
    model = adapted(FAMILIES["llama"].make())
    ll.save_adapter(model, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    good = weights.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    flipped[len(good) // 2] ^= 1
    weights.write_bytes(flipped)
    for arguments in (["inspect", tmp_path / "a"], ["inspect", tmp_path / "a", "--json"]):
        said = fails(1, capsys, *arguments)
        assert said.count("is not what was written (its SHA-256 differs)") == 2
    weights.write_bytes(good[:-10])
    assert "is damaged, or no safetensors file" in fails(1, capsys, "inspect", tmp_path / "a")
    weights.write_bytes(good)
    held = load_file(weights)
    held[next(iter(held))][0, 0] = float("nan")
    save_file(held, weights)
    assert "holds NaN or infinite values" in fails(1, capsys, "inspect", tmp_path / "a")
    A, B = (next(key for key in held if f"q_proj.lora_{part}" in key) for part in "AB")
    save_file({**held, A: torch.ones(4), B: torch.ones(32, 3)}, weights)
    assert "q_proj: A and B are no pair of rank 4: their shapes are [(4,), (32, 3)]" in fails(
        1, capsys, "inspect", tmp_path / "a"
    )
    save_file({**held, A: held[A].to(torch.int8)}, weights)
    assert "q_proj: A is torch.int8, where numbers with a fraction are needed" in fails(
        1, capsys, "inspect", tmp_path / "a"
    )
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    assert "is no JSON" in fails(1, capsys, "inspect", tmp_path / "a")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "run.ckpt").read_bytes()[:5000])
    assert "can't be read" in fails(1, capsys, "inspect", tmp_path / "cut.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "full.ckpt")
    assert "holds no adapters: it is a checkpoint of a whole model" in fails(
        1, capsys, "inspect", tmp_path / "full.ckpt"
    )
    assert "holds no adapter_config.json" in fails(1, capsys, "inspect", tmp_path)
    assert "does not exist" in fails(2, capsys, "inspect", tmp_path / "none")


def test_a_rank_that_is_not_that_of_the_tensors(tmp_path, capsys):
    """Two pairs of half the rank would be a stack of two matrices, which only target_parameters can ask for."""
    config = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(FAMILIES["llama"].make(), config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "r": 2}))
    for command in ("inspect", "analyze"):
        assert "q_proj: A and B are no pair of rank 2: their shapes are [(4, 32), (32, 4)]" in fails(
            1, capsys, command, tmp_path
        )


def test_other_methods_beside_lora(tmp_path, capsys):
    made = FAMILIES["bert"]
    module = Wrapped(made.make)
    fit = trainer(ll.LoRA(r=2, modules_to_save=None), Bottleneck(bottleneck_size=4, adapter_name="narrow"))
    fit.fit(module, one_batch(made.batch(module.net)))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    lora, narrow = told(capsys, tmp_path / "run.ckpt")["adapters"]
    own = ll.adapter_state_dict(module, "narrow")
    assert (lora["name"], lora["kind"], narrow["name"], narrow["kind"]) == ("default", "lora", "narrow", "bottleneck")
    assert narrow.keys() == ADAPTER_KEYS
    assert narrow["parameters"] == sum(value.numel() for value in own.values())
    assert {part["name"]: part["shape"] for part in narrow["in_full"]} == {k: [*v.shape] for k, v in own.items()}
    run("inspect", tmp_path / "run.ckpt")
    assert f"adapter narrow: bottleneck, {narrow['parameters']:,} parameters, " in capsys.readouterr().out
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved["state_dict"][next(iter(own))].view(-1)[0] = float("nan")
    torch.save(saved, tmp_path / "run.ckpt")
    assert f"{next(iter(own))}" in fails(1, capsys, "inspect", tmp_path / "run.ckpt")
