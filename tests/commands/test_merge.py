"""``merge``: the files of a merged model are those that ``merge_and_unload`` and ``save_pretrained`` would give."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from lightning_lora.files.merge import merge_files
from tests.commands.files import adapted, assert_same_tensors, fails, fitted, run, tensors
from tests.helpers.families import FAMILIES, TIED, logits_of, tied

KINDS = {
    "llama": ("llama", {}),
    "llama-dora": ("llama", {"use_dora": True}),
    "llama-rslora": ("llama", {"use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "llama-pissa": ("llama", {"init_lora_weights": "pissa"}),
    "llama-in-full": ("llama", {"modules_to_save": ["lm_head", "1.input_layernorm"]}),
    "llama-embedding": ("llama", {"target_modules": ["v_proj", "embed_tokens"]}),
    "tied": ("qwen2-tied", {}),
    "tied-biases": ("qwen2-tied", {"bias": "all"}),
    "tied-in-full": ("qwen2-tied", {"modules_to_save": ["embed_tokens"]}),
    "tied-head": ("qwen2-tied", {"target_modules": ["v_proj", "lm_head"]}),
    "tied-embedding-dora": ("qwen2-tied", {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-dora": ("gpt2", {"use_dora": True}),
    "gpt2-table": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "bert-head": ("bert", {}),
    "bert-head-dora": ("bert", {"use_dora": True}),
    "other-names-in-files": ("mixtral", {}),
    "other-names-in-vit": ("vit", {}),
    "convolutions": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "convolutions-dora": ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True}),
}


def made(folder, family, dtype=torch.float32, shards="30KB", **options):
    """A base, an adapter on it, and the merged model as it comes out of memory."""
    base = FAMILIES[family].make().to(dtype)
    base.save_pretrained(folder / "base", max_shard_size=shards)
    model = adapted(base, **{"target_modules": FAMILIES[family].target_modules, **options})
    ll.save_adapter(model, folder / "adapter")
    ll.merge_and_unload(model)
    model.save_pretrained(folder / "expected")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "options"), KINDS.values(), ids=KINDS)
def test_every_tensor_is_that_of_memory(tmp_path, family, options, dtype):
    model = made(tmp_path, family, dtype, **options)
    run("merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    ours, theirs = (type(model).from_pretrained(tmp_path / name).eval() for name in ("out", "expected"))
    batch = FAMILIES[family].batch(model)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_from_a_checkpoint_of_a_run(tmp_path, capsys):
    module = fitted(tmp_path, "bert")
    base = FAMILIES["bert"].make()
    base.save_pretrained(tmp_path / "base")
    run("merge", "--base", tmp_path / "base", tmp_path / "run.ckpt", tmp_path / "out")
    ll.merge_and_unload(module)
    module.net.save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    assert "merged 13 layers" in capsys.readouterr().out
    said = fails(
        2, capsys, "merge", "--base", tmp_path / "base", tmp_path / "run.ckpt", tmp_path / "x", "--adapter", "a"
    )
    assert "has no adapter 'a'" in said


def test_all_else_is_copied_and_other_weights_are_not(tmp_path, capsys):
    made(tmp_path, "llama")
    base = tmp_path / "base"
    (base / "tokenizer.json").write_text("mine")
    (base / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    (base / "old.pt").write_bytes(b"pickle")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "1_Pooling" / "weights.pth").write_bytes(b"pickle")
    run("merge", "--base", base, tmp_path / "adapter", tmp_path / "out")
    out = tmp_path / "out"
    kept = {path.name for path in base.iterdir()} - {"pytorch_model-00001-of-00002.bin", "old.pt"}
    assert {path.name for path in out.iterdir()} == kept
    assert (out / "tokenizer.json").read_text() == "mine"
    assert [path.name for path in (out / "1_Pooling").iterdir()] == ["config.json"]
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "model.safetensors.index.json").read_text()) == json.loads(
        (base / "model.safetensors.index.json").read_text()
    )
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(out / path.name, "pt") as other:
            assert one.metadata() == other.metadata()
            assert list(one.keys()) == list(other.keys())
    said = capsys.readouterr().err
    assert "not copied, since they hold weights of the base: 1_Pooling/weights.pth, old.pt" in said


@pytest.mark.parametrize("shards", ["30KB", "1GB"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_untied(tmp_path, target, shards):
    model = made(tmp_path, "qwen2-tied", shards=shards, target_modules=["v_proj", target])
    run("merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((tmp_path / "base" / "config.json").read_text()), "tie_word_embeddings": False}
    merged, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")["model.embed_tokens.weight"]
    other = {"lm_head": "model.embed_tokens", "embed_tokens": "lm_head"}[target]
    assert torch.equal(merged[f"{other}.weight"], base)
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    if shards == "30KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == merged.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
        assert index["metadata"]["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "end"), [(name, end) for name, (_, ends) in TIED.items() for end in ends])
def test_what_shares_a_weight_with_a_merged_layer_is_written_too(tmp_path, name, end):
    model, told = tied(name), tmp_path / "base" / "config.json"
    model.save_pretrained(tmp_path / "base")
    config = json.loads(told.read_text())
    config.pop("scale_decoder_outputs", None)  # T5's older files don't say what follows from what is tied
    told.write_text(json.dumps(config))
    model = adapted(model, target_modules=[end])
    ll.save_adapter(model, tmp_path / "adapter")
    ll.merge_and_unload(model).save_pretrained(tmp_path / "expected")
    run("merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("expected", "out")]
    assert configs[0].get("tie_word_embeddings") == configs[1].get("tie_word_embeddings")
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(again), logits_of(model))


def test_another_base_is_refused_unless_allowed(tmp_path, capsys):
    made(tmp_path, "llama")
    torch.manual_seed(5)
    other = FAMILIES["llama"].build()
    other.save_pretrained(tmp_path / "other")
    arguments = ["merge", "--base", tmp_path / "other", tmp_path / "adapter", tmp_path / "out"]
    said = fails(1, capsys, *arguments)
    assert "another base model" in said
    assert "--allow-base-mismatch" in said
    assert not (tmp_path / "out").exists()
    run(*arguments, "--allow-base-mismatch")
    ll.load_adapter(other, tmp_path / "adapter", allow_base_mismatch=True)
    ll.merge_and_unload(other)
    other.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "out")


def test_the_same_base_in_another_dtype_is_the_same(tmp_path):
    model = made(tmp_path, "llama")
    FAMILIES["llama"].make().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run("merge", "--base", tmp_path / "half", tmp_path / "adapter", tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(merged["model.layers.0.mlp.up_proj.weight"].float(), expected, rtol=2e-2, atol=2e-2)


def test_a_base_of_another_kind(tmp_path, capsys):
    made(tmp_path, "llama")
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "gpt2")
    said = fails(1, capsys, "merge", "--base", tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "out")
    assert "the model has no model.layers.0" in said
    FAMILIES["llama-classifier"].make().save_pretrained(tmp_path / "classifier")
    ll.save_adapter(adapted(FAMILIES["llama-classifier"].make()), tmp_path / "head")
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "head", tmp_path / "out")
    assert "the model has no score.weight, which the file has in full" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("checksums", [True, False])
def test_an_adapter_that_diverged_is_refused(tmp_path, capsys, value, checksums):
    made(tmp_path, "llama")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if checksums:
        data = bytearray(weights.read_bytes())
        data[-4:] = torch.tensor(value).numpy().tobytes()
        weights.write_bytes(data)
    else:
        held = load_file(weights)
        held[next(iter(held))][0, 0] = value
        save_file(held, weights)
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert ("SHA-256 differs" if checksums else "holds NaN or infinite values") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "expected"]


def test_what_is_too_large_for_the_dtype_is_refused(tmp_path, capsys):
    base = FAMILIES["llama"].make().to(torch.float16)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model = adapted(base)
    model.model.layers[1].mlp.down_proj.lora["default"].B.data[:] = 3e5
    ll.save_adapter(model, tmp_path / "adapter")
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "model.layers.1.mlp.down_proj.weight holds NaN or infinite values" in said
    assert "too large for float16" in said
    model = adapted(base, modules_to_save=["lm_head"])
    ll.save_adapter(model.float(), tmp_path / "adapter")
    weights, key = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    held = load_file(weights)
    save_file({**held, key: torch.full_like(held[key], 1e9)}, weights)
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "lm_head.weight, trained in full, in the dtype of the base, holds NaN or infinite values" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_damaged_bases(tmp_path, capsys):
    made(tmp_path, "llama")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))

    def said_of(change):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "base", tmp_path / "broken")
        change(tmp_path / "broken")
        said = fails(1, capsys, "merge", "--base", tmp_path / "broken", tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return said

    def rewrite(folder, header):
        path = folder / shards[1].name
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(header(json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def moved(header):
        key = next(key for key in header if key != "__metadata__")
        header[key]["data_offsets"][1] += 4
        return header

    def cut(folder):
        for path in shards[:2]:
            (folder / path.name).write_bytes(path.read_bytes()[:-100])

    said = said_of(cut)
    assert f"{shards[0].name} is cut off" in said
    assert f"{shards[1].name} is cut off" in said
    assert "does not exist" in said_of(lambda folder: (folder / shards[1].name).unlink())
    assert "is cut off" in said_of(lambda folder: (folder / shards[1].name).write_bytes(b"abc"))
    assert "no safetensors file" in said_of(lambda folder: (folder / shards[1].name).write_bytes(b"\xff" * 99))
    assert "its header is wrong about" in said_of(lambda folder: rewrite(folder, moved))
    assert "its header can't be read" in said_of(lambda folder: rewrite(folder, lambda header: [header]))
    assert "is no JSON" in said_of(lambda folder: (folder / "config.json").write_text("{"))
    index = "model.safetensors.index.json"
    assert "has no weight_map" in said_of(lambda folder: (folder / index).write_text("{}"))
    outside = json.dumps({"weight_map": {"a": "../base/model.safetensors"}})
    assert "which is no safetensors file beside it" in said_of(lambda folder: (folder / index).write_text(outside))
    swapped = json.loads((tmp_path / "base" / index).read_text())
    swapped["weight_map"]["lm_head.weight"] = shards[0].name
    assert "differ: lm_head.weight" in said_of(lambda folder: (folder / index).write_text(json.dumps(swapped)))

    def doubled(folder):
        held = {path.name: load_file(folder / path.name) for path in shards}
        key = next(iter(held[shards[0].name]))
        held[shards[1].name][key] = held[shards[0].name][key]
        save_file(held[shards[1].name], folder / shards[1].name, {"format": "pt"})

    assert "several files hold the same tensor" in said_of(doubled)

    def whole_numbers(folder):
        held = load_file(folder / shards[0].name)
        save_file({key: value.to(torch.int8) for key, value in held.items()}, folder / shards[0].name, {"format": "pt"})

    assert "is I8 in the files, to which nothing can be added: give the dense model" in said_of(whole_numbers)


def test_bases_that_can_not_be_merged_into(tmp_path, capsys):
    made(tmp_path, "llama")
    base, config = tmp_path / "base", json.loads((tmp_path / "base" / "config.json").read_text())

    def said_of(**changes):
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        return fails(1, capsys, "merge", "--base", base, tmp_path / "adapter", tmp_path / "out")

    assert "the base is quantised (gptq)" in said_of(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "give the dense model" in said_of(text_config={"quantization_config": {"quant_method": "fp8"}})
    assert "is of MyForCausalLM, which transformers" in said_of(architectures=["MyForCausalLM"])
    assert "is of no known class" in said_of(architectures=None)
    (base / "config.json").write_text(json.dumps(config))
    (base / "adapter_config.json").write_text("{}")
    said = fails(1, capsys, "merge", "--base", base, tmp_path / "adapter", tmp_path / "out")
    assert "loads an adapter too: give the model alone" in said
    (base / "adapter_config.json").unlink()
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    said = fails(1, capsys, "merge", "--base", base, tmp_path / "adapter", tmp_path / "out")
    assert "pytorch_model.bin is a pickle" in said
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_what_their_configuration_says(tmp_path, capsys):
    made(tmp_path, "llama")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "intermediate_size": 96}))
    ll.save_adapter(adapted(wider, target_modules=["down_proj"]), tmp_path / "wider")
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "wider", tmp_path / "out")
    assert "down_proj.weight is (32, 48) in the files, and (32, 96) by their configuration" in said


def test_bad_usage(tmp_path, capsys):
    made(tmp_path, "llama")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    assert "required: --base" in fails(2, capsys, "merge", adapter, out)
    assert "does not exist" in fails(2, capsys, "merge", "--base", tmp_path / "none", adapter, out)
    assert "does not exist" in fails(2, capsys, "merge", "--base", base, tmp_path / "none", out)
    assert "is a file" in fails(2, capsys, "merge", "--base", base / "config.json", adapter, out)
    assert "is (in) the base's folder" in fails(2, capsys, "merge", "--base", base, adapter, base / "out")
    assert "is not empty: give a new folder" in fails(2, capsys, "merge", "--base", base, adapter, adapter)
    assert "holds no adapter_config.json" in fails(1, capsys, "merge", "--base", base, base, out)
    (tmp_path / "empty").mkdir()
    run("merge", "--base", base, adapter, tmp_path / "empty")
    assert_same_tensors(tmp_path / "expected", tmp_path / "empty")


def test_what_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    made(tmp_path, "llama")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_lora.formats.model_folder.ModelFolder.write_index", full)
    with pytest.raises(OSError, match="disk full"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_frozen_table_that_peft_brings(tmp_path, capsys):
    """PEFT writes the base's embedding beside an adapter on it: it has to be the base's."""
    made(tmp_path, "llama", target_modules=["v_proj", "embed_tokens"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    held, key = load_file(weights), "base_model.model.model.embed_tokens.base_layer.weight"
    table = tensors(tmp_path / "base")["model.embed_tokens.weight"]
    save_file({**held, key: table}, weights)
    run("merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    save_file({**held, key: table + 1}, weights)
    arguments = ["merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "other"]
    assert "brings a model.embed_tokens.weight that is not the base's" in fails(1, capsys, *arguments)
    run(*arguments, "--allow-base-mismatch")
    assert "was replaced by that of" in capsys.readouterr().err
    merged = tensors(tmp_path / "out")["model.embed_tokens.weight"]
    torch.testing.assert_close(tensors(tmp_path / "other")["model.embed_tokens.weight"], merged + 1)


def test_what_peft_started_with_a_part_of_the_weight(tmp_path, capsys):
    made(tmp_path, "llama")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as from PEFT, with nothing that says more
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["init_lora_weights"] = "pissa"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    said = fails(1, capsys, "merge", "--base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "save it with ll.save_adapter against the clean base" in said


def test_the_report_and_the_names_are_those_of_memory(tmp_path):
    base = FAMILIES["llama"].make().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    ll.save_adapter(adapted(base), tmp_path / "adapter")
    model = copy.deepcopy(base)
    ll.load_adapter(model, tmp_path / "adapter")
    seen = []
    found = merge_files(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", on_progress=lambda *args: seen.append(args)
    )
    assert found.report == ll.merge(model)
    assert found.notes == []
    sizes = [path.stat().st_size for path in sorted((tmp_path / "base").glob("*.safetensors"))]
    assert seen == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(len(sizes))]


MEASURE = """
import re, sys
from pathlib import Path
import torch
from lightning_lora.files.merge import merge_files
torch.set_num_threads(1)

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

merge_files(sys.argv[1], sys.argv[2], "warm")  # a small one first, for all that is imported and set up once
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = resident("VmRSS")
merge_files(sys.argv[3], sys.argv[4], "out")
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_memory_is_that_of_the_adapter_and_a_piece(tmp_path):
    """A base of 290 MB in four files, whose largest tensor has 33 MB."""
    made(tmp_path, "llama")
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, vocab_size=16384
    )
    large = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "large", max_shard_size="80MB")
    ll.save_adapter(adapted(large, target_modules=["q_proj", "up_proj", "down_proj"]), tmp_path / "of-large")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 280e6
    folders = [tmp_path / name for name in ("base", "adapter", "large", "of-large")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    adapter = (tmp_path / "of-large" / "adapter_model.safetensors").stat().st_size
    assert int(done.stdout) < 2 * adapter + 20e6 < 33e6, done.stdout


def test_two_tensors_for_what_is_one_in_the_base(tmp_path):
    """Of a base that was untied before its ends were trained in full: one of them would be written over the other."""
    base = FAMILIES["qwen2-tied"].make()
    base.save_pretrained(tmp_path / "base")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    model = adapted(base, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ll.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ll.CheckpointError, match="differ in the file, and are tied in the model: untie them"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_base_mismatch=True)
    assert not (tmp_path / "out").exists()


def test_other_rows_for_either_end_of_one_table(tmp_path):
    base = FAMILIES["qwen2-tied"].make()
    base.save_pretrained(tmp_path / "base")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    rows = {"embed_tokens": [4], "lm_head": [4]}
    ll.save_adapter(adapted(base, target_modules=["v_proj"], trainable_token_indices=rows), tmp_path / "adapter")
    with pytest.raises(ll.CheckpointError, match="have other rows in the file, and one table in the model: untie them"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_base_mismatch=True)
    assert not (tmp_path / "out").exists()
