"""LoRAMonitor on two ranks: both measure the same, also beside a sharded base; adapters in pieces are refused."""

import pytest
import torch

from tests.helpers import forks

pytestmark = pytest.mark.gloo


def test_on_two_ranks(tmp_path):
    forks.finish("tests.distributed.monitor_run", [tmp_path], forks.ranks(2))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    ddp, fsdp2 = results["ddp"]["values"], results["fsdp2"]["values"]
    assert min(ddp[f"lora/default/{what}"] for what in ("magnitude_drift", "grad_norm", "step_norm")) > 0
    assert fsdp2 == pytest.approx(ddp, rel=1e-4)
    in_fit, in_analysis = results["sharded"]["said"]
    assert "this rank has a part only of the adapter" in in_fit
    assert "net.blocks.0.q" in in_fit
    assert "analyze: the model is spread over ranks: save the adapter" in in_analysis
    assert results["fsdp2"]["said"] == [in_analysis]
    assert results["ddp"]["said"] == []
