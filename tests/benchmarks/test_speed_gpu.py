"""The GPU's part of the speed benchmark, as far as it can be tried without one: its workloads on a CPU, and what notes them."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.benchmarks.speed import __main__ as program
from tests.benchmarks.speed import docs, held, models, run, timing, workloads_gpu
from tests.benchmarks.speed.launches import kernel_names
from tests.benchmarks.speed.steps import around
from tests.benchmarks.speed.tables import tables

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = ["7b", "1b", "small"]


def quick(path, *options):
    program.main(["--quick", "--table", "cuda", "--out", str(path), *options])
    return json.loads((path / "speed-cpu.json").read_text())


@pytest.mark.slow
def test_all_workloads_run(tmp_path, capsys):
    """But for the compiled ones, which take long and are no others than a CPU's."""
    table = [w for w in workloads_gpu.workloads(SIZES, "cpu", quick=True) if w.how not in run.COMPILED]
    results = quick(tmp_path, "--only", *{w.name for w in table}, "held", "kernels")
    assert results["failed"] == []
    assert [row["name"] for row in results["timings"]] == [w.name for w in table]
    assert all([*row["seconds"]] == [*w.variants] for row, w in zip(results["timings"], table, strict=True))
    assert len(results["held"]) == len(results["kernels"]) == 7
    assert "ours, without kernels" in capsys.readouterr().out


def test_workloads_of_a_gpu_have_its_sizes():
    table = [*workloads_gpu.workloads(SIZES, "cuda")]
    steps = [w for w in table if w.how == "step" and not w.point]
    assert {w.size for w in steps} == {*SIZES}
    assert all("ours eager" in w.variants for w in steps)
    assert not any("ours eager" in w.variants for w in table if w not in steps)
    assert {w.case.device for w in table} == {"cuda"}
    assert {w.size for w in steps if w.case.base == "nf4-dq"} == {"7b"}
    assert [w.how for w in table][-4:] == ["compiled"] * 2 + ["graphs"] * 2


def test_graphs_are_asked_for(monkeypatch):
    """Of a model that is compiled; the floor is none."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    for workload in workloads_gpu.workloads(["small"], "cpu", quick=True):
        if workload.how == "graphs":
            tiny = {variant: run._act(workload, variant) for variant in workload.variants}
            run._act(dataclasses.replace(workload, size="two"), "ours")()
            [act() for act in tiny.values()]
    assert asked == [*[{"backend": "eager"}] * 3, {"mode": "reduce-overhead"}] * 2


def test_without_kernels_is_without_them():
    from lightning_lora.ops import kernels

    def off():
        return kernels._off

    with around("ours"):
        assert not off()
    with around("ours eager"):
        assert off()
    assert not off()


def test_a_variant_that_fails_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    def fail(model, case):
        raise RuntimeError("no memory\nfor it")

    monkeypatch.setitem(models.VARIANTS, "PEFT", fail)
    with pytest.raises(SystemExit, match="lora, tiny bf16: PEFT: RuntimeError: no memory"):
        quick(tmp_path, "--only", "lora")
    results = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert len(results["failed"]) == 1
    (row,) = results["timings"]
    assert "PEFT" not in row["seconds"]
    assert "PEFT bf16" in row["seconds"]
    assert "| LoRA, tiny bf16 |" in capsys.readouterr().out


def test_what_was_measured_is_there_when_something_fails(tmp_path, monkeypatch):
    def fail(model, case):
        assert not case.dora, "the base of the comparison"
        return floor(model, case)

    floor = models.VARIANTS["floor"]
    monkeypatch.setitem(models.VARIANTS, "floor", fail)
    with pytest.raises(SystemExit, match="forward-dora: AssertionError: the base of the comparison"):
        quick(tmp_path, "--only", "forward-*")
    assert [r["name"] for r in json.loads((tmp_path / "speed-cpu.json").read_text())["timings"]] == ["forward-lora"]


def test_a_run_in_parts(tmp_path):
    first = quick(tmp_path, "--only", "forward-lora", "growth-rank-lora")
    second = quick(tmp_path, "--only", "growth-rank-lora", "forward-dora", "--keep")
    assert [row["name"] for row in second["timings"]] == ["forward-lora", "growth-rank-lora", "forward-dora"]
    assert second["timings"][0] == first["timings"][0]
    assert second["timings"][1] != first["timings"][1]
    assert len(quick(tmp_path, "--only", "forward-dora")["timings"]) == 1


def test_nothing_begins_after_the_budget(tmp_path):
    with pytest.raises(SystemExit, match="forward-lora: 0 s were over"):
        quick(tmp_path, "--only", "forward-lora", "--budget", "1e-9")
    assert json.loads((tmp_path / "speed-cpu.json").read_text())["timings"] == []


def test_short_acts_are_taken_several_times():
    now, acts = [0.0], []

    def act():
        acts.append(1)
        now[0] += 0.03 if len(acts) > 1 else 5.0  # the first one compiles

    take = timing.timed(act, lambda: now[0], least=0.1)
    assert [take() for _ in range(4)] == pytest.approx([5.0, 0.03, 0.03, 0.03])
    assert len(acts) == 1 + 1 + 4 + 4
    assert timing.timed(act, lambda: now[0])() == pytest.approx(0.03)
    assert len(acts) == 11


def test_a_gpu_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    timing.timed(lambda: waits.append(2), timing.clock("cuda"))()
    assert waits == [1, 2, 1]


def test_the_peak_is_beyond_what_was_there(monkeypatch):
    memory = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    assert held.peak_bytes(lambda: memory.update(peak=350)) == 250


def test_kernels_of_a_profile():
    def event(name, device=DeviceType.CUDA, mark=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=mark)

    events = [event("gemm"), event("aten::mm", DeviceType.CPU), event("Memset (Device)"), event("step", mark=True)]
    assert kernel_names(events) == ["gemm"]


def results_of_a_gpu():
    def row(seconds, **more):
        return {"title": "LoRA", "size": "7b", "base": "bf16", "tokens": 8192, "point": None, **seconds, **more}

    taken = {"seconds": {"floor": [1.0, 1.0], "ours": [1.1, 1.1], "ours eager": [1.2, 1.2], "PEFT": [2.2, 2.2]}}
    lacking = {"seconds": {"floor": [1.0, 1.0], "PEFT": [2.2, 2.2]}}
    peak = dict.fromkeys(("floor", "ours", "ours eager", "PEFT", "products"), 2**30)
    environment = {"device": "NVIDIA H100", "clock": "wall clock", "date": "2026-01-01", "torch": "2.11", "peft": None}
    grown = {"how": "step", "point": ["rank", 8]}
    timings = [row(taken, how="step", peak=peak), row(lacking, how="step"), row(taken, **grown)]
    timings += [row(lacking, **grown) | {"title": "DoRA"}, row(lacking, how="trainer")]
    return {"environment": environment | {"triton": "3.6"}, "timings": timings, "failed": ["a"]}


def test_tables_of_what_is_there():
    text = "\n".join(tables(results_of_a_gpu()))
    assert "| LoRA, 7b bf16 | 1.10 | 1.20 | 2.20 | **2.00** (2.00 to 2.00) |" in text
    assert "| LoRA, 7b bf16 |  |  | 2.20 |  |" in text
    assert "| LoRA, 7b bf16 | 1024 | 1024 | 1024 | 1024 |" in text
    assert "| 8 | 1.10 | 2.20 |  | 2.20 |" in text


def test_the_section_has_a_part_for_each_device(tmp_path):
    (tmp_path / "speed-cuda.json").write_text(json.dumps(results_of_a_gpu()))
    for place in (program.RESULTS / "speed-cpu.json", docs.PAGE.parent / "speed-cpu.png"):
        (tmp_path / place.name).write_bytes(place.read_bytes())
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"{docs.BEGIN}\n{docs.END}\n")
    docs.write(tmp_path, page)
    text = page.read_text()
    cpu, gpu = text.index("### On 1 thread of an AMD"), text.index("### On one NVIDIA H100\n")
    assert cpu < gpu < text.index("*7b* has two blocks")
    assert "2026-01-01, wall clock; torch 2.11, triton 3.6." in text
    assert (page.parent / "speed-cuda.png").exists()  # drawn: the run left none


def test_the_page_has_what_was_measured(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(docs.PAGE.read_text())
    for place in [*program.RESULTS.glob("speed-*.json"), *docs.PAGE.parent.glob("speed-*.png")]:
        (tmp_path / place.name).write_bytes(place.read_bytes())
    docs.write(tmp_path, page)
    assert page.read_text() == docs.PAGE.read_text()


def test_an_error_is_said_in_a_line(capsys):
    assert run.said(ValueError("a\nb")) == "ValueError: a"
    assert "ValueError: a\nb" in capsys.readouterr().err
