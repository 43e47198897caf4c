"""The docs have the table that the benchmark computes."""

import pytest

from tests.benchmarks.communication import Parameters, ddp_lora, fsdp_full, fsdp_lora, table
from tests.helpers.nodes import ROOT


def test_the_table_in_the_docs():
    rows = [line for line in (ROOT / "docs" / "multi_node.md").read_text().splitlines() if line.startswith("|")]
    assert rows[-10:] == table().splitlines()


def test_what_a_ring_sends():
    n = Parameters(base=1000, adapters=10)
    assert ddp_lora(n, 2) == 40  # one half in either phase
    assert fsdp_full(n, 2) == 3 * 1000
    assert fsdp_lora(n, 10**9) == pytest.approx(2 * 2000 + 2 * 40)
    assert not any(size(n, 1) for size in (ddp_lora, fsdp_full, fsdp_lora))
