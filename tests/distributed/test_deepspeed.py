"""ZeRO on two processes over gloo, in float32 and bfloat16. DeepSpeed itself runs on CPUs, Lightning's strategy only
after `deepspeed_run` has taken its check for CUDA away. Its float16 engine and its own offloaded optimizers need a GPU.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lightning_lora as ll
from tests.helpers import forks
from tests.helpers.toy import Lit

if find_spec("deepspeed") is None:  # importing it here would set up an accelerator
    pytest.skip("deepspeed is not installed", allow_module_level=True)

pytestmark = pytest.mark.gloo

ROOT, CPU = Path(__file__).parents[2], "tests.distributed.deepspeed_run.CPUDeepSpeed"
TRAINED, BASE = 452, 1152  # parameters; of each, Adam has two states
WHOLE = {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}  # else small weights stay whole


def run(name, folder: Path, ckpt: Path | None = None, fails: bool = False, **options) -> str:
    devices = options.get("devices", 1 if name == "single" else 2)
    ranks = forks.ranks(devices) if devices > 1 else [{}]
    folder.mkdir(exist_ok=True)
    ends = forks.run(
        "tests.distributed.deepspeed_run",
        [name, folder, *([ckpt] if ckpt else [])],
        [{**rank, "OPTIONS": json.dumps(options)} for rank in ranks],
    )
    said = "".join(end.output for end in ends)
    assert [end.code != 0 for end in ends] == [fails] * len(ends), said[-5000:]
    return said


def end(folder: Path) -> dict:
    """What a run ended with: of DeepSpeed the file that every strategy reads."""
    return torch.load(
        next(p for p in (folder / "end.adapters.ckpt", folder / "end.ckpt") if p.is_file()), weights_only=True
    )


def assert_same(one: dict, other: dict, tolerance: float = 0.0) -> None:
    """Adapters, states and step counters of the optimizer, settings of its groups, and schedulers: bit for bit.

    With a tolerance tensors may differ by that part of their largest value.
    """

    def same(key, value, found):
        value, found = torch.as_tensor(value), torch.as_tensor(found)
        atol = tolerance * value.abs().max().item() if value.dim() else 0.0
        torch.testing.assert_close(found, value, rtol=0.0, atol=atol, msg=lambda text: f"{key}: {text}")

    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, value in one["state_dict"].items():
        same(key, value, other["state_dict"][key])
    states, others = one["optimizer_states"][0], other["optimizer_states"][0]
    assert states["param_groups"] == others["param_groups"]
    assert states["state"].keys() == others["state"].keys()
    for index, state in states["state"].items():
        assert state.keys() == others["state"][index].keys()
        for key, value in state.items():
            same(f"{key} of {index}", value, others["state"][index][key])
    assert one["lr_schedulers"] == other["lr_schedulers"]


def rounding(stage: int) -> float:
    """Stage 3 gathers weights in a layer's forward: adapters are computed behind it, not in one step with it."""
    return 1e-5 if stage == 3 else 0.0


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run("ddp", folder)
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_does_what_ddp_does_and_both_ways_to_resume_it_are_exact(tmp_path, ddp, stage):
    run(stage, tmp_path / "whole")
    whole = end(tmp_path / "whole")
    assert_same(end(ddp), whole, rounding(stage))
    assert len(whole["optimizer_states"][0]["state"]) == 10
    assert all(state["step"] == 8 for state in whole["optimizer_states"][0]["state"].values())
    run(stage, tmp_path / "folder", tmp_path / "whole" / "epoch=0.ckpt")
    assert_same(whole, end(tmp_path / "folder"))
    run(stage, tmp_path / "file", ddp / "epoch=0.ckpt")
    assert_same(whole, end(tmp_path / "file"), rounding(stage))
    if rounding(stage):
        run(stage, tmp_path / "own", tmp_path / "whole" / "epoch=0.adapters.ckpt")
        assert_same(whole, end(tmp_path / "own"))


def test_ddp_and_one_device_go_on_from_the_file_of_stage_3(tmp_path, ddp):
    run(3, tmp_path / "zero", **WHOLE)
    file = tmp_path / "zero" / "epoch=0.adapters.ckpt"
    run("ddp", tmp_path / "ddp", file)
    assert_same(end(ddp), end(tmp_path / "ddp"), rounding(3))
    run("single", tmp_path / "single", file, max_epochs=1)
    assert_same(torch.load(file, weights_only=True), end(tmp_path / "single"))
    module = ll.load_from_checkpoint(Lit, file)
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in ll.adapter_state_dict(module).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_saving_sends_and_writes_what_is_trained(tmp_path, stage):
    """Values and two states of each; stage 3 gathers the values of adapters once more, to describe them."""
    run(stage, tmp_path, **WHOLE)
    sent = json.loads((tmp_path / "traffic.json").read_text())
    assert sent == TRAINED * (3 if stage == 2 else 4)
    for path in (tmp_path / "end.ckpt").rglob("*_model_states.pt"):
        saved = torch.load(path, weights_only=False)
        assert saved["module"].keys() == end(tmp_path)["state_dict"].keys()
        assert not saved.get("frozen_param_fragments")
        if stage == 2:
            assert sum(value.numel() for value in saved["module"].values()) == TRAINED


def test_stage_3_on_another_number_of_ranks_and_without_training(tmp_path):
    """DeepSpeed can do neither from its own folder: the file beside it is read."""
    run(3, tmp_path / "two", stages=["validate", "test", "predict"], again=True, **WHOLE)
    run(3, tmp_path / "one", tmp_path / "two" / "epoch=0.ckpt", devices=1, max_epochs=1)
    assert_same(torch.load(tmp_path / "two" / "epoch=0.adapters.ckpt", weights_only=True), end(tmp_path / "one"))


@pytest.mark.parametrize("stage", [2, 3])
def test_dora_and_lora_plus_on_a_model_that_is_built_late(tmp_path, stage):
    options = {"built": "configure_model", "lora": {"use_dora": True, "loraplus_lr_ratio": 4, "save_peft": True}}
    run(stage, tmp_path / "zero", **options, **WHOLE)
    run("ddp", tmp_path / "ddp", **options)
    assert_same(end(tmp_path / "ddp"), end(tmp_path / "zero"), rounding(stage))
    assert (tmp_path / "zero" / "end.peft" / "adapter_model.safetensors").is_file()


def test_groups_that_are_empty_are_in_the_file_and_not_in_deepspeed(tmp_path):
    """Of two learning rates the second one is used; a scheduler counts both."""
    run("ddp", tmp_path / "ddp", two_groups=True)
    rates = json.loads((tmp_path / "ddp" / "rates.json").read_text())
    run(2, tmp_path / "zero", two_groups=True)
    assert json.loads((tmp_path / "zero" / "rates.json").read_text()) == rates
    run("ddp", tmp_path / "back", tmp_path / "zero" / "epoch=0.adapters.ckpt", two_groups=True)
    assert_same(end(tmp_path / "ddp"), end(tmp_path / "back"))


def test_checkpointed_blocks(tmp_path):
    run("ddp", tmp_path / "ddp", checkpointing=True, max_epochs=1)
    for stage in (1, 2, 3):
        run(stage, tmp_path / str(stage), checkpointing=True, max_epochs=1)
        assert_same(end(tmp_path / "ddp"), end(tmp_path / str(stage)), rounding(stage))


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks(tmp_path, stage):
    for name in ("ddp", stage):
        run(name, tmp_path / str(name), compiled=True, max_epochs=1)
        assert json.loads((tmp_path / str(name) / "graphs.json").read_text()) > 0
    assert_same(end(tmp_path / "ddp"), end(tmp_path / str(stage)))


def test_4_bit_base(tmp_path):
    options = {"lora": {"quantization": "nf4-dq"}}
    run("ddp", tmp_path / "ddp", **options)
    run(3, tmp_path / "zero", **options)
    assert_same(end(tmp_path / "ddp"), end(tmp_path / "zero"), rounding(3))
    run(3, tmp_path / "rest", tmp_path / "zero" / "epoch=0.ckpt", **options)
    assert_same(end(tmp_path / "zero"), end(tmp_path / "rest"))


def test_bfloat16_engines_keep_float32_masters_in_the_file(tmp_path):
    for stage in (1, 2, 3):
        run(stage, tmp_path / str(stage), precision="bf16-mixed")
    assert_same(end(tmp_path / "1"), end(tmp_path / "2"))
    assert_same(end(tmp_path / "1"), end(tmp_path / "3"), 0.05)  # bfloat16 has 8 bits, and these are 8 steps
    for stage, other in ((1, 2), (3, 3)):
        assert any(not torch.equal(v, v.bfloat16().float()) for v in end(tmp_path / str(stage))["state_dict"].values())
        file = tmp_path / str(other) / "epoch=0.adapters.ckpt"
        run(stage, tmp_path / f"rest-{stage}", file, precision="bf16-mixed")
        assert_same(end(tmp_path / str(stage)), end(tmp_path / f"rest-{stage}"))


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states(tmp_path, ddp, stage):
    run(stage, tmp_path, strategy={"offload_optimizer": True}, config={"zero_force_ds_cpu_optimizer": False})
    assert_same(end(ddp), end(tmp_path), rounding(stage))


def test_the_example_trains_and_goes_on(tmp_path):
    """Its YAML as it stands, but for what makes it run on a CPU, and on little data."""
    examples = ROOT / "examples"
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy.class_path={CPU}"]
    config = ["--config", str(examples / "configs" / "deepspeed.yaml")]
    little = ["--data.examples=64", "--trainer.limit_val_batches=2"]
    script = str(examples / "many_devices.py")
    for epochs, more in ((1, []), (2, ["--ckpt_path=runs/deepspeed/epoch=0.ckpt"])):
        arguments = ["fit", *config, *cpu, *little, f"--trainer.max_epochs={epochs}", *more]
        forks.finish(script, arguments, forks.ranks(2), tmp_path)
        saved = torch.load(tmp_path / f"runs/deepspeed/epoch={epochs - 1}.adapters.ckpt", weights_only=True)
        assert saved["global_step"] == 4 * epochs
        assert len(saved["state_dict"]) == 2 * 28
        assert all(value.any() for value in saved["state_dict"].values())  # B begins as zeros


def test_removing_a_checkpoint_removes_both(tmp_path):
    run(1, tmp_path, save_top_k=1)
    names = {path.name for path in tmp_path.glob("epoch*")}
    assert names == {"epoch=1.ckpt", "epoch=1.adapters.ckpt"}


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_that_get_no_gradient_are_noticed(tmp_path, stage):
    error = run(stage, tmp_path, fails=True, dead=True)
    assert "net.blocks.1.q.lora.default.A" in error
    assert "called, but no gradient came back" in error


def test_another_adapter_is_refused_before_anything_is_loaded(tmp_path):
    run(2, tmp_path / "one", max_epochs=1)
    error = run(2, tmp_path / "two", tmp_path / "one" / "epoch=0.ckpt", fails=True, lora={"lora_alpha": 4})
    assert "lora_alpha: 16.0 -> 4" in error
    error = run(2, tmp_path / "two", tmp_path / "one" / "epoch=0.ckpt", fails=True, ckpt_of_rank_0=True)
    assert error.count("ckpt_path: 'epoch=0.ckpt' on rank 0, None on rank 1") == 2  # both ranks say so


@pytest.mark.parametrize("stage", [2, 3])
def test_another_ratio_of_loraplus_is_refused(tmp_path, stage):
    """Learning rates come back from DeepSpeed's folder, and from the file beside it."""
    run(stage, tmp_path / "one", max_epochs=1, lora={"loraplus_lr_ratio": 4})
    for file in ("epoch=0.ckpt", "epoch=0.adapters.ckpt"):
        error = run(stage, tmp_path / "two", tmp_path / "one" / file, fails=True, lora={"loraplus_lr_ratio": 8})
        assert "another loraplus_lr_ratio: 4 -> 8" in error
    run(stage, tmp_path / "same", tmp_path / "one" / "epoch=0.ckpt", lora={"loraplus_lr_ratio": 4})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_float16_on_a_gpu(tmp_path, stage, offload):
    options = {"accelerator": "cuda", "devices": 1, "precision": "16-mixed"}
    if offload and stage > 1:
        options["strategy"] = {"offload_optimizer": True, "offload_parameters": stage == 3}
    run(stage, tmp_path / "whole", optimizer="cpu_adam" if offload and stage > 1 else None, **options)
    run(
        stage,
        tmp_path / "rest",
        tmp_path / "whole" / "epoch=0.ckpt",
        optimizer="cpu_adam" if offload and stage > 1 else None,
        **options,
    )
    assert_same(end(tmp_path / "whole"), end(tmp_path / "rest"))
