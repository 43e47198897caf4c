"""Where figures come from."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "triton")


def environment(device: str) -> dict[str, Any]:
    """The device, the processor, versions and the day."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "clock": "process time" if device == "cpu" and torch.get_num_threads() == 1 else "wall clock",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "float32 products": torch.get_float32_matmul_precision(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, and what matters of its instructions."""
    info = Path("/proc/cpuinfo")
    lines = (
        dict(line.split("\t: ", 1) for line in info.read_text().splitlines() if "\t: " in line) if info.exists() else {}
    )
    name = next((value for key, value in lines.items() if key.strip() == "model name"), platform.processor())
    flags = next((value.split() for key, value in lines.items() if key.strip() == "flags"), [])
    return name + (" (AVX512-bf16)" if "avx512_bf16" in flags else "")
