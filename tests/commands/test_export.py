"""``export``: a checkpoint becomes, without its model, the folder that ``save_adapter`` writes."""

import json

import pytest
import torch
from safetensors import safe_open

import lightning_lora as ll
from lightning_lora.formats.fingerprint import pack, unpack
from tests.commands.files import assert_same_files, fails, fitted, run
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer

KINDS = {
    "lora": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 7}}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora-rslora": ("llama", {"init_lora_weights": "olora", "use_rslora": True}),
    "embedding-dora": ("llama", {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True}),
    "in-full": ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "1.input_layernorm"]}),
    "bias-all": ("qwen2-tied", {"bias": "all"}),
    "bias-lora_only": ("opt", {"bias": "lora_only"}),
    "tied-embedding": ("qwen2-tied", {"target_modules": ["v_proj", "embed_tokens"]}),
    "tied-in-full": ("qwen2-tied", {"modules_to_save": ["lm_head"]}),
    "tied-encoder-decoder": ("t5", {"modules_to_save": ["lm_head"]}),
    "gpt2-conv1d": ("gpt2", {}),
    "head": ("bert", {}),
    "convolutions": ("convnet", {}),
    "convolutions-dora": ("convnet", {"use_dora": True}),
    "encoder-decoder": ("t5", {}),
    "4-bit": ("llama", {"quantization": "nf4-dq"}),
    "loftq": ("llama", {"quantization": "nf4-dq", "init_lora_weights": "loftq"}),
}


@pytest.mark.parametrize(("family", "options"), KINDS.values(), ids=KINDS)
def test_it_is_what_save_adapter_writes(tmp_path, family, options):
    module = fitted(tmp_path, family, **options)
    ll.save_adapter(module, tmp_path / "live", step=2)
    run("export", tmp_path / "run.ckpt", tmp_path / "out")
    assert_same_files(tmp_path / "live", tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lightning_lora"])["step"] == 2


def test_one_of_several_adapters(tmp_path, capsys):
    family = FAMILIES["llama"]
    module = Wrapped(family.make)
    callbacks = [ll.LoRA(r=r, adapter_name=name) for name, r in (("korean", 2), ("coding", 3))]
    fit = trainer(*callbacks)
    fit.fit(module, one_batch(family.batch(module.net)))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    for name in ("korean", "coding"):
        run("export", tmp_path / "run.ckpt", tmp_path / name, "--adapter", name)
        ll.save_adapter(module, tmp_path / "live" / name, name, step=2)
        assert_same_files(tmp_path / "live" / name, tmp_path / name)
    assert "adapter 'coding'" in capsys.readouterr().out
    assert "holds the adapters korean, coding" in fails(1, capsys, "export", tmp_path / "run.ckpt", tmp_path / "x")
    said = fails(1, capsys, "export", tmp_path / "run.ckpt", tmp_path / "x", "--adapter", "kroean")
    assert "Did you mean 'korean'" in said
    assert not (tmp_path / "x").exists()


def test_what_a_checkpoint_does_not_say(tmp_path, capsys):
    fitted(tmp_path, "llama")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del checkpoint["lightning_lora"]["peft"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert "does not say how PEFT would have adapter 'default'" in fails(
        1, capsys, "export", tmp_path / "old.ckpt", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_what_peft_would_compute_otherwise(tmp_path, capsys):
    fitted(tmp_path, "llama")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    record = unpack(checkpoint["lightning_lora"]["peft"]["default"])
    record["problems"] = ["conv: groups", "other: dilation"]
    checkpoint["lightning_lora"]["peft"]["default"] = pack(record)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    said = fails(1, capsys, "export", tmp_path / "odd.ckpt", tmp_path / "out")
    assert "2 problems:\n  - conv: groups\n  - other: dilation" in said


def test_a_checkpoint_that_says_nonsense(tmp_path, capsys):
    fitted(tmp_path, "llama")
    for record, why in ((torch.zeros(9, dtype=torch.uint8), "can't be read"), (pack({"prefix": ""}), "can't be read")):
        checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
        checkpoint["lightning_lora"]["peft"]["default"] = record
        torch.save(checkpoint, tmp_path / "odd.ckpt")
        assert why in fails(1, capsys, "export", tmp_path / "odd.ckpt", tmp_path / "out")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    record = unpack(checkpoint["lightning_lora"]["peft"]["default"])
    record["shapes"] = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [3, 5, 7]}
    checkpoint["lightning_lora"]["peft"]["default"] = pack(record)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    said = fails(1, capsys, "export", tmp_path / "odd.ckpt", tmp_path / "out")
    assert "q_proj.lora_A.weight has 128 values, and should be [3, 5, 7]" in said
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_bad_usage(tmp_path, capsys):
    fitted(tmp_path, "llama")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    key = next(key for key in checkpoint["state_dict"] if key.endswith(".B"))
    checkpoint["state_dict"][key][0, 0] = float("inf")
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "full.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "run.ckpt").read_bytes()[:5000])
    (tmp_path / "file").write_text("in the way")
    for name, why in {
        "odd.ckpt": "holds NaN or infinite values",
        "full.ckpt": "holds no adapters",
        "cut.ckpt": "can't be read",
    }.items():
        assert why in fails(1, capsys, "export", tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "does not exist" in fails(2, capsys, "export", tmp_path / "none.ckpt", tmp_path / "out")
    assert "is a file: give a folder" in fails(2, capsys, "export", tmp_path / "run.ckpt", tmp_path / "file")
    said = fails(2, capsys, "export", tmp_path / "run.ckpt", tmp_path / "out", "--adapter", "defualt")
    assert "has no adapter 'defualt'. Did you mean 'default'" in said


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_model_gets_no_adapter_beside_it(weights, tmp_path, capsys):
    """Transformers loads an adapter with the model that lies in its folder, from then on and unasked."""
    fitted(tmp_path, "llama")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", weights, "tokenizer.json"):
        (model / name).write_text("{}")
    said = fails(2, capsys, "export", tmp_path / "run.ckpt", model)
    assert f"{model} holds a model (config.json, {weights})" in said
    assert "give another folder" in said
    assert not (model / "adapter_config.json").exists()
    (model / weights).unlink()
    run("export", tmp_path / "run.ckpt", model)
    run("export", tmp_path / "run.ckpt", model)
    assert (model / "tokenizer.json").exists()


def test_a_checkpoint_that_lacks_a_tensor(tmp_path, capsys):
    fitted(tmp_path, "llama")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    lost = next(key for key in saved["state_dict"] if key.endswith(".A"))
    del saved["state_dict"][lost]
    torch.save(saved, tmp_path / "run.ckpt")
    said = fails(1, capsys, "export", tmp_path / "run.ckpt", tmp_path / "out")
    assert f"{lost.partition('.lora.')[0]}: A and B are no pair of rank" in said
    assert not (tmp_path / "out").exists()
