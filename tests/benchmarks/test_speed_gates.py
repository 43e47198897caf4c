"""What of the speed can be asserted on any machine: held bytes, kernels and graph breaks; and that the program runs."""

import json
from dataclasses import replace

import pytest

from tests.benchmarks.speed import __main__ as program
from tests.benchmarks.speed import docs, run
from tests.benchmarks.speed.cases import SIZES, Case, Size
from tests.benchmarks.speed.kernels import Operations, count_kernels
from tests.benchmarks.speed.models import build
from tests.benchmarks.speed.workloads import ADAPTERS

HELD = {  # PEFT's bytes over ours, at least
    "lora": 3.5,
    "lora-dropout": 4.3,
    "dora": 5.3,
    "dora-dropout": 4.4,
    "dora-low-rank-dropout": 7.0,
}
KERNELS = {
    "lora": 27,
    "lora-dropout": 34,
    "dora": 57,
    "dora-dropout": 110,
    "dora-low-rank-dropout": 64,
}  # where q, k and v share their input, at most
pytestmark = [
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


FOUR = replace(SIZES["small"], layers=4, vocab=512)  # of "small": what layers hold is told by as many, in half the time


def case(name, size):
    return Case(size=size if isinstance(size, Size) else SIZES[size], **ADAPTERS[name])


@pytest.fixture(scope="module")
def floor():
    return run.held_of("floor", case("lora", FOUR))


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_bytes_held_for_the_backward_pass(name, floor):
    four = case(name, FOUR)
    theirs, ours = (run.held_of(variant, four) - floor for variant in ("PEFT", "ours"))
    assert theirs / ours >= HELD[name]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_three_linears_with_one_input(name):
    passes = count_kernels("ours", case(name, "tiny")).passes
    assert len(passes) <= KERNELS[name], passes


@pytest.mark.parametrize(("variant", "passes"), [("floor", 8), ("PEFT", 53), ("PEFT bf16", 38), ("unsloth", 50)])
def test_kernels_are_counted_as_they_are_known(variant, passes):
    assert len(count_kernels(variant, case("lora", "tiny")).passes) == passes


def test_the_bound_has_the_products_of_every_site():
    tiny = case("lora", "tiny")
    model, bare, ids = build("products", tiny), build("floor", tiny), tiny.ids()
    counts = []
    for each in (model, bare):
        with Operations() as passes:
            each(input_ids=ids, labels=ids)
        counts.append(passes.names.count("mm"))
    shared, own = 3 * 4, 3 * 7  # x Aᵀ, dh A and dhᵀ x of 4 inputs in a block; h Bᵀ, dy B and hᵀ dy of 7 layers
    assert counts[0] - counts[1] == tiny.size.layers * (shared + own)


@pytest.mark.parametrize("name", ADAPTERS)
def test_graphs_are_whole(name):
    assert run.count_breaks("ours", case(name, "tiny")) == 0


@pytest.mark.filterwarnings("ignore")
def test_the_program_runs(tmp_path, capsys):
    """One of each kind, and the section of the docs from its file."""
    timed = ["lora", "qdora", "forward-dora", "generation-dora", "compiled-lora", "trainer-lora"]
    program.main(["--quick", "--out", str(tmp_path), "--only", *timed, "growth-rank-*", "kernels"])
    results = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert {row["name"] for row in results["timings"]} == {*timed, "growth-rank-lora", "growth-rank-dora"}
    assert all(len(taken) == 2 for row in results["timings"] for taken in row["seconds"].values())
    assert results["environment"]["peft"]
    assert (tmp_path / "speed-cpu.png").stat().st_size < 100_000
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"# Before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    docs.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"# Before\n{docs.BEGIN}\n## Speed")
    assert text.endswith(f"{docs.END}\nafter\n")
    assert "old" not in text
    assert "| LoRA, tiny bf16 |" in text
    assert "LoRA, tiny bf16" in capsys.readouterr().out
    docs.write(tmp_path, page)
    assert page.read_text() == text
    assert (page.parent / "speed-cpu.png").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_run_is_not_written_over_the_whole(capsys):
    with pytest.raises(SystemExit):
        program.main(["--only", "lora", "--docs"])
    assert "--docs needs a full run" in capsys.readouterr().err


def test_packed_sites_have_no_more_kernels_than_pefts():
    packed = replace(case("lora", "tiny"), base="nf4-dq")
    ours, theirs = (len(count_kernels(variant, packed).passes) for variant in ("ours", "PEFT"))
    assert ours < theirs
