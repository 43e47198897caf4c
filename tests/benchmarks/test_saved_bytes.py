"""What can be asserted of the benchmarks: bytes, not times."""

import pytest
import torch

from tests.benchmarks.qlora import CASES, make_base, pair, saved_bytes


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")
@pytest.mark.parametrize("case", CASES)
def test_bytes_saved_for_the_backward_pass(tmp_path, case):
    make_base(str(tmp_path), 256)
    ours, theirs = pair(str(tmp_path), **CASES[case])
    ids = torch.randint(0, 512, (1, 128))
    assert saved_bytes(ours, ids) <= 0.75 * saved_bytes(theirs, ids)
