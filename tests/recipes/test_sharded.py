"""A base that is sharded before it is read; and the same run on one device, with FSDP2 and with DDP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from lightning_lora import CheckpointError
from lightning_lora.recipes import SequenceClassifier
from lightning_lora.recipes.building import built, dtype_of, loaded, of_shapes
from lightning_lora.recipes.sharded import open_files
from lightning_lora.recipes.tokens import load_config
from tests.recipes import files
from tests.recipes.sharded_run import fit, predict
from tests.recipes.test_accumulation import RECORDS
from tests.recipes.test_generation import gpt2


@pytest.mark.gloo
@pytest.mark.slow
def test_each_rank_reads_its_part_and_runs_are_those_of_one_device(tmp_path):
    """In float64, with tied embeddings, rows that two ranks can't share equally, and losses by tokens.

    And the same texts, though ranks have other numbers of prompts, with less room behind them.
    """
    base = files.llama(tmp_path / "base", tie_word_embeddings=True, intermediate_size=45)
    path = files.jsonl(tmp_path / "a.jsonl", RECORDS)
    other, room = gpt2(tmp_path / "gpt2"), (1, 200, 246, 250, 300, 1, 2)
    prompts = files.jsonl(tmp_path / "b.jsonl", [{"prompt": f"Say {i}" + " a" * n} for i, n in enumerate(room)])
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.sharded_run", str(tmp_path), base, path, other, prompts],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    fit(str(tmp_path), base, path, 1, "auto", "one")
    predict(str(tmp_path), other, prompts, 1, "auto", 3)
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("1-3", "2-1", "2-3")]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].count("\n") == len(room)

    def saved(name: str, step: int) -> dict:
        return torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=True)["state_dict"]

    for name, step in (("fsdp2", 1), ("fsdp2", 4), ("again", 4), ("ddp", 4)):
        wanted, found = saved("one", step), saved(name, step)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10, msg=f"{name} {step} {key}")
    ranks = [torch.load(tmp_path / f"read-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(rank["read"] == rank["local"] and rank["tied"] for rank in ranks)
    assert sum(rank["read"] for rank in ranks) == ranks[0]["all"] == ranks[1]["all"]
    assert max(rank["read"] for rank in ranks) < 0.51 * ranks[0]["all"]


@pytest.mark.parametrize(
    ("base", "auto", "new"),
    [
        ("llama", "AutoModelForCausalLM", set()),
        ("llama", "AutoModelForSequenceClassification", {"score.weight"}),
        ("bert", "AutoModelForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("t5", "AutoModelForSeq2SeqLM", set()),
    ],
)
def test_a_base_without_memory_is_that_of_transformers(base, auto, new, request):
    """Names, shapes, dtypes, buffers; and which weights no file has."""
    source = request.getfixturevalue(base)
    own = open_files(source)
    made = own.build(getattr(tf, auto), load_config(source), torch.float32, attn_implementation="eager")
    assert made.config._attn_implementation == "eager"
    wanted = getattr(tf, auto).from_pretrained(source)
    described = [
        {name: (p.shape, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
        for model in (made, wanted)
    ]
    assert described[0] == described[1]
    assert {name for name, p in made.named_parameters() if not p.is_meta} == new
    assert all(p.std() > 0 for name, p in made.named_parameters() if not p.is_meta and "bias" not in name)
    for (name, buffer), (_, other) in zip(made.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, msg=name)
    own.map(made)
    found, state = made.state_dict(), wanted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.items() if name not in new)
    half = own.build(getattr(tf, auto), load_config(source), torch.bfloat16)
    if base == "t5":  # of which transformers leaves a part in float32
        assert half is None
    else:
        assert half.dtype is torch.bfloat16


def test_the_dtype_of_files_whose_configuration_names_none(tmp_path):
    """As transformers finds it: that of the first numbers, in front of which may be counts."""
    config = tf.BertConfig(**{**files.SIZES, **files.IDS, "vocab_size": 320})
    tf.BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"bert.embeddings.a": torch.arange(3), **load_file(path)}, path, {"format": "pt"})
    named = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in named.items() if k != "dtype"}))
    recipe = SequenceClassifier(str(tmp_path), labels=["a", "b"])
    assert dtype_of(recipe, load_config(recipe.base)) is torch.bfloat16
    assert (
        loaded(recipe).dtype
        is of_shapes(recipe).dtype
        is built(recipe, open_files(recipe.base)).dtype
        is torch.bfloat16
    )


def test_what_transformers_has_to_load(tmp_path):
    """Experts that are several tensors in the files; pickles. Files that are damaged are said to be."""
    sizes = {**files.SIZES, **files.IDS, "vocab_size": 320, "num_key_value_heads": 2, "num_local_experts": 2}
    tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).save_pretrained(tmp_path / "experts")
    own = open_files(str(tmp_path / "experts"))
    assert own.build(tf.AutoModelForCausalLM, load_config(str(tmp_path / "experts")), torch.float32) is None
    weights = tmp_path / "experts" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors is cut off"):
        open_files(str(tmp_path / "experts"))
    weights.rename(tmp_path / "experts" / "pytorch_model.bin")
    assert open_files(str(tmp_path / "experts")) is None
    assert open_files("no/where") is None
