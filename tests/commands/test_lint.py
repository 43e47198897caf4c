"""``lint``: what each consumer of PEFT folders refuses, on folders that have it."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from tests.commands.files import adapted, fails, run
from tests.helpers.families import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:[^!]*is more than the rank that"),  # tiny layers
]


def folder(tmp_path, family="llama", base="someone/base", **options):
    model = FAMILIES[family].make()
    model.config._name_or_path = base
    ll.save_adapter(adapted(model, **{"modules_to_save": None, **options}), tmp_path / "a")
    return tmp_path / "a"


def messages(path, target, **options):
    return [str(finding) for finding in ll.lint(path, target, **options)]


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "transformers", "peft"])
def test_a_plain_adapter_is_taken_by_everybody(tmp_path, capsys, target):
    path = folder(tmp_path)
    assert ll.lint(path, target) == []
    run("lint", path, "--target", target)
    assert "nothing to say about" in capsys.readouterr().out


CASES = {
    "vllm-dora": ("vllm", {"use_dora": True}, ["does not serve DoRA", *["unsupported LoRA weight"] * 14]),
    "vllm-in-full": (
        "vllm",
        {"modules_to_save": ["1.input_layernorm"]},
        ["serves no modules that are trained in full (1.input_layernorm)", "unsupported LoRA weight"],
    ),
    "vllm-biases": ("vllm", {"family": "qwen2-tied", "bias": "all"}, ["(bias='all')", *["unsupported"] * 6]),
    "vllm-rank": ("vllm", {"r": 40}, ["rank 40 is more than max_lora_rank=16: start it with --max-lora-rank 64"]),
    "vllm-rank-pattern": (
        "vllm",
        {"r": 8, "rank_pattern": {"0.self_attn.v_proj": 20}},
        ["rank 20 is more", "layers.0.self_attn.v_proj: it has one r and one lora_alpha for all layers, and would"],
    ),
    "vllm-alpha-pattern": ("vllm", {"alpha_pattern": {"0.mlp.up_proj": 3}}, ["by 1.5 instead of 0.75"]),
    "vllm-rslora": ("vllm", {"use_rslora": True}, []),
    "vllm-pissa": ("vllm", {"init_lora_weights": "pissa"}, []),
    "vllm-vocabulary": (
        "vllm",
        {"target_modules": ["v_proj", "lm_head", "embed_tokens"]},
        ["lm_head: only models that name it", "embed_tokens: only models that name it"],
    ),
    "vllm-convolution": (
        "vllm",
        {"family": "vit", "target_modules": ["projection", "q_proj"], "modules_to_save": None},
        ["vit.embeddings.patch_embeddings.projection: adapters on convolutions are refused"],
    ),
    "llama.cpp-dora": ("llama.cpp", {"use_dora": True}, ["it knows no DoRA"]),
    "llama.cpp-in-full": (
        "llama.cpp",
        {"modules_to_save": ["1.input_layernorm", "lm_head"]},
        ["the converter stops at tensors", "a norm that is trained in full is written, and ignored"],
    ),
    "llama.cpp-biases": ("llama.cpp", {"family": "qwen2-tied", "bias": "all"}, ["the converter stops"] * 6),
    "llama.cpp-base": ("llama.cpp", {"base": None}, ["call convert_lora_to_gguf.py with --base"]),
    "llama.cpp-rslora": ("llama.cpp", {"use_rslora": True}, ["it knows no use_rslora"]),
    "llama.cpp-rank-pattern": ("llama.cpp", {"rank_pattern": {"v_proj": 20}}, []),
    "llama.cpp-alpha-pattern": ("llama.cpp", {"alpha_pattern": {"0.mlp.up_proj": 3}}, ["by 1.5 instead of 0.75"]),
    "llama.cpp-head": ("llama.cpp", {"target_modules": ["v_proj", "lm_head"]}, ["lm_head: it is refused where"]),
    "llama.cpp-embedding": ("llama.cpp", {"target_modules": ["v_proj", "embed_tokens"]}, []),
    "llama.cpp-gpt2": ("llama.cpp", {"family": "gpt2"}, ["it transposes the factors of GPT-2's Conv1D"]),
    "llama.cpp-convolution": (
        "llama.cpp",
        {"family": "vit", "target_modules": ["projection", "q_proj"], "modules_to_save": None},
        ["the converter takes factors of two dimensions only"],
    ),
    "transformers-dora": ("transformers", {"use_dora": True}, []),
    "transformers-in-full": ("transformers", {"modules_to_save": ["lm_head"], "bias": "all"}, []),
    "peft-everything": (
        "peft",
        {"family": "qwen2-tied", "modules_to_save": ["1.input_layernorm"], "bias": "all", "use_dora": True},
        [],
    ),
}


@pytest.mark.filterwarnings("ignore:bias=.* trains nothing")
@pytest.mark.parametrize(("target", "options", "expected"), CASES.values(), ids=CASES)
def test_what_is_found(tmp_path, target, options, expected):
    found = messages(folder(tmp_path, **options), target)
    assert len(found) == len(expected), found
    for said, words in zip(found, expected, strict=True):
        assert said.startswith(f"{target}: ")
        assert words in said


def test_a_rank_that_vllm_was_started_with(tmp_path, capsys):
    path = folder(tmp_path, r=40)
    assert ll.lint(path, "vllm", max_lora_rank=64) == []
    run("lint", path, "--max-lora-rank", "64")
    assert "max_lora_rank must be one of 1, 8, 16" in fails(2, capsys, "lint", path, "--max-lora-rank", "48")
    large = folder(tmp_path, r=600, target_modules=["q_proj"])
    assert "reduce it by ll.to_lora" in messages(large, "vllm")[0]


def test_magnitudes_as_peft_writes_them(tmp_path):
    """transformers leaves them out; PEFT itself reads them in both ways."""
    config = LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)
    get_peft_model(FAMILIES["llama"].make(), config).save_pretrained(tmp_path / "a")
    found = ll.lint(tmp_path / "a", "transformers")
    assert [finding.layer for finding in found] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert "left out without a word" in found[0].message
    assert ll.lint(tmp_path / "a", "peft") == []


def test_without_peft(tmp_path, monkeypatch):
    path = folder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs PEFT, which is not installed" in messages(path, "transformers")[0]
    assert "not installed here" in messages(path, "peft")[0]
    assert ll.lint(path, "vllm") == []


def test_what_newer_peft_may_write(tmp_path):
    path = folder(tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "use_magic": True, "other": None}))
    held = load_file(path / "adapter_model.safetensors")
    save_file({**held, "base_model.model.odd": torch.zeros(1)}, path / "adapter_model.safetensors")
    fields, tensor = messages(path, "peft")
    assert "has no field 'use_magic' (here True)" in fields
    assert "odd: no field of the configuration says what it is" in tensor
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["experts.gate_up_proj"]}))
    assert any("target_parameters" in said for said in messages(path, "vllm"))
    assert any("target_parameters" in said for said in messages(path, "llama.cpp"))


def test_the_command(tmp_path, capsys):
    path = folder(tmp_path, use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(SystemExit) as caught:
        run("lint", path)
    written = capsys.readouterr()
    assert caught.value.code == 1
    assert written.out.splitlines()[0].startswith("vllm: it does not serve DoRA")
    assert len(written.out.splitlines()) == len(ll.lint(path))
    assert "max_lora_rank must be one of" in fails(2, capsys, "lint", path, "--max-lora-rank", 24)
    assert ll.lint(path, "transformers", max_lora_rank=24) == ll.lint(path, "transformers")  # which has no such limit
    said = fails(2, capsys, "lint", path, "--target", "vlm")
    assert "target must be one of 'vllm', 'llama.cpp', 'transformers', 'peft', got 'vlm'" in said
    assert "Did you mean 'vllm'" in said
    assert "does not exist" in fails(2, capsys, "lint", tmp_path / "none")
    assert "is no PEFT folder" in fails(1, capsys, "lint", tmp_path)
    (path / "adapter_config.json").write_text("[]")
    assert "holds a list, not the fields" in fails(1, capsys, "lint", path)
    (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "only LORA can be checked" in fails(1, capsys, "lint", path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "8", "rank_pattern": [1]}')
    assert "3 problems" in fails(1, capsys, "lint", path)
    odd = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": 5}
    (path / "adapter_config.json").write_text(json.dumps(odd))
    assert "target_modules must be a list of names, got 5" in fails(1, capsys, "lint", path)
    (path / "adapter_config.json").write_text("{")
    assert "is no JSON" in fails(1, capsys, "lint", path)
