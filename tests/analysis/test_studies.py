"""The studies run as they stand, on less."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import transformers

from tests.recipes import files

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
LOGS = ("lightning.pytorch", "lightning_lora", "bitsandbytes")
SMALL = ["--seeds", "1", "2", "--steps", "2", "--batch", "2", "--examples", "2"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs a study with arguments, and returns the rows of its tables, by their first cell."""
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.chdir(tmp_path)
    before, levels = set(sys.modules), {name: logging.getLogger(name).level for name in LOGS}
    verbosity = transformers.utils.logging.get_verbosity()

    def run(name, *arguments):
        importlib.import_module(name).main([*arguments, "--out", str(tmp_path / "out")])
        assert list((tmp_path / "out").glob(f"{name}*.png"))
        lines = (tmp_path / "out" / f"{name}.txt").read_text().splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line and "---" not in line]
        return {row[0]: row[1:] for row in cells}

    yield run
    for name in {"study", "docstrings", *(path.stem for path in STUDIES.glob("*.py"))} - before:
        sys.modules.pop(name, None)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def kept(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]


def mean(cell):
    return float(cell.split(" ± ")[0].replace(",", ""))


@pytest.mark.slow
def test_rank(study, tmp_path):
    rows = study("rank", "--ranks", "1", "2", *SMALL)
    assert [row for row in rows if "," not in row] == ["adapter", "r=1", "r=2", "pair"]
    assert rows["r=1"][1].startswith("1.000")  # an update of rank 1 has effective rank 1, whatever the seed
    assert 1 < mean(rows["r=2"][1]) <= 2
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"similarity_left.png", "singular_values.png"} <= figures


def test_methods(study, tmp_path):
    base = files.bert(tmp_path / "bert")
    names, each, other = {"base": base, "targets": "query|value"}, {"each": "4", "epochs": "1"}, {"tokens": "8"}
    options = [part for name, value in (names | each | other).items() for part in (f"--{name}", value)]
    methods = ["head alone", "BitFit", "LoRA", "DoRA", "QLoRA", "QDoRA"]
    study(
        "methods", *options, "--trial", "0", "3", "--methods", *methods, "--factors", "0.001", "1", "--seeds", "1", "2"
    )
    lines = (tmp_path / "out" / "methods.txt").read_text().splitlines()[2 : 2 + len(methods)]
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in lines)}
    head, adapter, magnitudes = 32 * 10 + 10, 4 * 8 * 64, 4 * 32
    model = transformers.AutoModel.from_pretrained(base)
    biases = sum(p.numel() for name, p in model.named_parameters() if "bias" in name and "pooler" not in name)
    sizes = [head, head + biases, *[head + adapter, head + adapter + magnitudes] * 2]
    assert {name: int(mean(row[0])) for name, row in rows.items()} == dict(zip(methods, sizes, strict=True))
    tried = {}
    for run in kept(tmp_path, "methods"):
        if run["seed"] in (0, 3):
            tried[run["setting"]] = tried.get(run["setting"], 0) + run["measured"]["loss"] / 2
    assert len(kept(tmp_path, "methods")) == 2 * len(tried) + 2 * len(methods)
    for method, row in rows.items():
        own = method if method in ("head alone", "BitFit") else "LoRA"
        best = min((setting for setting in tried if setting.startswith(f"{own},")), key=tried.__getitem__)
        assert f"{own}, lr {row[1]}" == best
        assert 0 <= mean(row[2]) <= 100


def test_matrices(study, tmp_path):
    rows = study("matrices", "--lrs", "0.01", *SMALL, "--seeds", "0")
    *same, mlp, everything = [run["measured"]["parameters"] for run in kept(tmp_path, "matrices")]
    assert {*same, everything} == {4 * 256 * 46}  # what the study calls the same budget
    assert 0 < 1 - mlp / everything < 0.03
    assert rows["MLP"][:3] == ["6", "46,080", "0.01"]
    assert mean(rows["MLP"][3]) == pytest.approx(kept(tmp_path, "matrices")[-2]["measured"]["bits per byte"], abs=1e-3)


def test_alpha(study, tmp_path):
    rows = study("alpha", "--alphas", "4", "16", "--lrs", "0.01", "--ranks", "2", "8", *SMALL)
    assert rows["\N{GREEK SMALL LETTER ALPHA}=16"] == rows["r=8"][:1]  # the same run
    assert rows["r=2"][0] != rows["r=2"][1]
    values = [run["measured"]["bits per byte"] for run in kept(tmp_path, "alpha")]
    assert len(values) == 2 * 5


def test_variants_train_with_the_best_learning_rate_of_the_trial(study, tmp_path):
    arguments = ["--methods", "LoRA", "norms", "full", "--factors", "0.001", "1", *SMALL]
    study("variants", *arguments)
    lines = (tmp_path / "out" / "variants.txt").read_text().splitlines()[2:5]
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in lines)}
    assert [int(mean(row[0])) for row in rows.values()] == [4 * 8 * 2_944, 9 * 128, 1_082_496]
    tried = {run["setting"]: run["measured"]["bits per byte"] for run in kept(tmp_path, "variants") if run["seed"] == 0}
    assert len(tried) == 6
    for method, row in rows.items():
        best = min((setting for setting in tried if setting.startswith(f"{method}, ")), key=tried.__getitem__)
        assert best == f"{method}, lr {row[1]}"


def test_bases(study):
    rows = study("bases", "--modes", "float32", "bfloat16", "nf4", "nf4-dq", *SMALL)
    assert [rows[mode][0] for mode in ("float32", "bfloat16", "nf4", "nf4-dq")] == [
        "32.000",
        "16.000",
        "4.500",
        "4.128",
    ]
    errors = [mean(rows[mode][1]) for mode in ("float32", "bfloat16", "nf4")]
    assert errors[0] == 0 < errors[1] < 1 < errors[2] < 20


def test_latency(study):
    rows = study(
        "latency", "--widths", "32", "--shapes", "1x1", "2x3", "--rounds", "2", "--adapters", "LoRA, r=8", "2 LoRA, r=8"
    )
    assert list(rows) == ["model", *(f"width 32, {name}" for name in ("LoRA, r=8", "2 LoRA, r=8", "merged", "base"))]
    assert all(mean(cell.split(" ")[0]) > 0 for name, row in rows.items() if name != "model" for cell in row)


def test_runs_go_on_where_they_were_interrupted(study, tmp_path, monkeypatch):
    runs, done = importlib.import_module("study").Runs, []

    def run(setting, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((setting, seed))
        return {"value": float(len(done))}

    path = tmp_path / "out" / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        runs(path, steps=1)(["a", "b"], [1, 2], run)
    assert done == [("a", 1), ("b", 1), ("a", 2)]
    del done[:2]
    rows = runs(path, steps=1)(["a", "b"], [1, 2], run)
    assert rows == {"a": [{"value": 1.0}, {"value": 3.0}], "b": [{"value": 2.0}, {"value": 2.0}]}
    assert runs(path, steps=1)(["a", "b"], [1, 2], run) == rows
    del done[:]
    assert runs(path, steps=2)(["a"], [1], run) == {"a": [{"value": 1.0}]}  # another budget is another run
    assert len(path.read_text().splitlines()) == 5
