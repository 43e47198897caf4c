"""The studies run as they stand, on less."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rank(tmp_path):
    arguments = ["--ranks", "1", "2", "--seeds", "1", "2", "--steps", "2", "--examples", "8", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / "studies" / "rank.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, *_ = (line.split(" | ") for line in (tmp_path / "rank.txt").read_text().splitlines()[2:4])
    assert [row[0] for row in (one, two)] == ["| r=1", "| r=2"]
    assert one[2] == "1.000 ± 0.000"  # an update of rank 1 has effective rank 1, whatever the seed
    assert 1 < float(two[2].split(" ± ")[0]) <= 2
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"similarity_left.png", "singular_values.png"} <= figures
    assert (tmp_path / "rank-2.png").is_file()


def test_methods(tmp_path):
    arguments = ["--base", "demo", "--targets", "q_proj|v_proj", "--each", "4", "--epochs", "1", "--seeds", "1", "2"]
    script = str(ROOT / "examples" / "studies" / "methods.py")
    command = [sys.executable, script, *arguments, "--methods", "head alone", "LoRA", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "methods.txt").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["head alone", "LoRA"]
    assert [int(row[3].replace(",", "")) for row in rows] == [1_290, 1_290 + 8 * 8 * 256]
    assert all(0 <= float(row[1].split(" ± ")[0]) <= 100 for row in rows)
    assert (tmp_path / "methods.png").stat().st_size > 1000
