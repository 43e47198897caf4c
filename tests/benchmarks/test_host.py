"""The measurement of what the host takes runs, and layers take the ways that it says."""

import pytest
import torch

from lightning_lora.layers import activation
from tests.benchmarks import host
from tests.benchmarks.speed.cases import SIZES, Case


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
def test_it_runs(capsys):
    host.main(["--base", "fp32", "--layers", "2", "--seconds", "0"])
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head == "|  | ours | ours fused | PEFT | PEFT bf16 | torchtune |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {title}, fp32" for title in host.CASES]
    assert all(len([int(cell.strip(" |")) for cell in row.split(" | ")[1:]]) == 5 for row in rows)


@pytest.mark.parametrize(("variant", "way"), [("ours", "linear_by_operations"), ("ours fused", "fused_linears")])
def test_the_ways(monkeypatch, variant, way):
    taken, real, before = [], getattr(activation, way), activation.starts_count
    step = host.build(variant, Case(size=SIZES["tiny"], base="fp32"), 3)
    monkeypatch.setattr(activation, way, lambda *args: taken.append(1) or real(*args))
    step()
    assert len(taken) == 3
    assert activation.starts_count is before
