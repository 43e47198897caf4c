"""The callback in a Trainer on a GPU: all precisions, resuming to the bit, files for a CPU, fused optimizers."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import is_quantized
from tests.gpu import DEVICE, MARKS, ON_CPU
from tests.gpu.modules import Small, batches, own, trainer_of
from tests.gpu.sites import assert_near

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"),
]
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {"quantization": "nf4-dq"},
    "qdora": {"quantization": "nf4-dq", "use_dora": True},
}
variants = pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
precisions = pytest.mark.parametrize("precision", PRECISIONS)
PAIRS = [
    *(("32-true", name) for name in VARIANTS),
    *((precision, name) for precision in ("bf16-mixed", "16-mixed") for name in ("lora", "dora", "qdora")),
    *(("bf16-true", name) for name in ("lora", "qdora")),
]
pairs = pytest.mark.parametrize(("precision", "lora"), [(p, VARIANTS[n]) for p, n in PAIRS], ids=map("-".join, PAIRS))


def fit(folder=None, *, lora=None, epochs=2, n=2, precision="32-true", ckpt_path=None, optimizer=None, **options):
    pl.seed_everything(5, verbose=False)
    saver = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    module, run = (
        Small(optimizer),
        trainer_of(own(lora), *saver, precision=precision, max_epochs=epochs, **options),
    )
    run.fit(module, batches(n), ckpt_path=ckpt_path)
    return module, run


def state_of(module, run):
    states = run.optimizers[0].state_dict()["state"]
    return {
        **{key: value.clone() for key, value in ll.adapter_state_dict(module).items()},
        **{f"{i}.{key}": value for i, state in states.items() for key, value in state.items()},
    }


@pairs
def test_it_learns(tmp_path, precision, lora):
    module, run = fit(tmp_path, lora=lora, precision=precision, epochs=12, n=1)
    assert len(module.losses) == 12
    assert module.losses[-1] < module.losses[0] - 0.2
    for name, layer in lora_layers(module):
        adapter = layer.lora["default"]
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}, name
        assert adapter.B.count_nonzero()
        assert adapter.B.isfinite().all()
        assert is_quantized(layer) == ("quantization" in lora)
    saved = torch.load(tmp_path / "epoch=11.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == ll.adapter_state_dict(module).keys()
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


@pairs
def test_resumed_to_the_bit(tmp_path, precision, lora):
    """Dropout on: the generator of the device goes on where it was, and so does the gradient scaler."""
    whole, run = fit(tmp_path / "whole", lora=lora, precision=precision)
    resumed, again = fit(
        tmp_path / "rest", lora=lora, precision=precision, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt"
    )
    assert again.global_step == run.global_step == 4
    assert resumed.losses == whole.losses[2:]
    expected, found = state_of(whole, run), state_of(resumed, again)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    if precision == "16-mixed":
        scalers = [each.precision_plugin.scaler.state_dict() for each in (run, again)]
        assert scalers[0] == scalers[1]


@variants
def test_the_same_bits_in_two_runs(lora):
    first, second = (fit(lora=lora, precision="bf16-mixed") for _ in range(2))
    assert first[0].losses == second[0].losses
    assert all(torch.equal(value, state_of(*second)[key]) for key, value in state_of(*first).items())


@variants
def test_files_for_a_cpu(tmp_path, lora):
    """What is loaded there computes what was computed on the GPU, from a checkpoint and from a PEFT folder."""
    module, run = fit(tmp_path, lora={**lora, "save_peft": True}, epochs=3)
    path = tmp_path / "epoch=2.ckpt"
    batch = next(iter(batches()))
    tokens = batch["input_ids"]
    predicted = run.predict(module, batches(1))[0].float().cpu()
    with torch.no_grad():
        direct = module.to(DEVICE).eval().net(tokens.to(DEVICE)).logits.cpu()
        assert_near(direct, predicted, 1e-4)
        with_base = Small()
        if "quantization" in lora:
            ll.quantize(with_base, lora["quantization"])
        ll.load_adapter(with_base, path)
        assert {p.device.type for p in with_base.parameters()} == {"cpu"}
        assert_near(with_base.eval().net(tokens).logits, direct, 1e-3)
        if "quantization" not in lora:
            loaded = ll.load_from_checkpoint(Small, path)
            assert {p.device.type for p in loaded.parameters()} == {"cpu"}
            assert_near(loaded.eval().net(tokens).logits, direct, 1e-4)
        ll.save_adapter(module, tmp_path / "peft")
        from_folder = Small()
        if "quantization" in lora:
            ll.quantize(from_folder, lora["quantization"])
        ll.load_adapter(from_folder.net, tmp_path / "peft")
        assert_near(from_folder.eval().net(tokens).logits, direct, 1e-3)
        ll.merge_and_unload(module)
        assert_near(module.net(tokens.to(DEVICE)).logits.cpu(), direct, 1e-3)


@precisions
def test_stages_after_a_fit(tmp_path, precision):
    module, run = fit(tmp_path, lora={"use_dora": True}, precision=precision)
    before = run.validate(module, batches(), verbose=False)
    fresh = trainer_of(own({"use_dora": True}), precision=precision)
    after = fresh.validate(Small(), batches(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert after[0]["val_loss"] == pytest.approx(before[0]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("lora", [VARIANTS["lora"], VARIANTS["dora"], VARIANTS["qdora"]], ids=["lora", "dora", "qdora"])
def test_fused_optimizers(lora):
    """These change values without telling: norms that are kept between steps have to follow all the same."""
    found = []
    for optimizer in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        module, run = fit(lora={**lora, "lora_dropout": 0.0}, optimizer=optimizer, epochs=3)
        found.append((module.losses, {k: v.clone() for k, v in ll.adapter_state_dict(module).items()}))
        for name, layer in lora_layers(module):
            if lora.get("use_dora"):
                adapter = layer.lora["default"]
                merged = layer.lora_matrix() + adapter.scaling * adapter.B @ adapter.A
                torch.testing.assert_close(adapter.norms(layer), merged.norm(dim=1), rtol=1e-4, atol=1e-5, msg=name)
    for losses, values in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-3)
        for key, value in values.items():
            torch.testing.assert_close(value, found[0][1][key], rtol=1e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_optimizers_of_bitsandbytes(tmp_path, monkeypatch, name):
    import bitsandbytes as bnb

    make = getattr(bnb.optim, name)
    monkeypatch.setattr(Small, "configure_optimizers", lambda self: make(self.parameters(), lr=1e-2))
    lora = {"quantization": "nf4-dq", "lora_dropout": 0.1}
    whole, run = fit(tmp_path / "whole", lora=lora)
    resumed, _ = fit(tmp_path / "rest", lora=lora, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    for key, value in ll.adapter_state_dict(whole).items():
        assert torch.equal(ll.adapter_state_dict(resumed)[key], value), key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [VARIANTS["lora"], VARIANTS["qdora"]], ids=["lora", "qdora"])
def test_options_of_a_trainer(lora, checkpointing):
    """Accumulated and clipped gradients, blocks that are computed again, LoRA+, a scheduler, validation in between."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    results = []
    for again in (False, checkpointing):
        module, _ = fit(lora={**lora, "gradient_checkpointing": again, "loraplus_lr_ratio": 4.0}, **options, epochs=3)
        results.append(module.losses)
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.skipif(ON_CPU, reason="there are no graphs of CUDA")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of inductor
@pytest.mark.parametrize("lora", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_graphs_of_cuda(lora):
    """A network that is compiled to them learns what it learns in eager steps."""
    torch.compiler.reset()
    losses = []
    for mode in (None, "reduce-overhead"):
        pl.seed_everything(5, verbose=False)
        module = Small()
        module.net = module.net if mode is None else torch.compile(module.net, mode=mode)
        run = trainer_of(own({**lora, "lora_dropout": 0.0}), max_epochs=6)
        run.fit(module, batches())
        losses.append(module.losses)
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_where_things_are(tmp_path):
    module, run = fit(tmp_path, lora={"use_dora": True, "quantization": "nf4-dq"})
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not ON_CPU:
            assert tensor.device.type in ("cuda", "cpu"), name
    saved = torch.load(tmp_path / "epoch=1.ckpt", map_location="cpu", weights_only=True)
    assert all(value.device.type == "cpu" for value in saved["state_dict"].values())
    assert (saved["lightning_lora"]["rng"][0]["cuda"] is None) == (not torch.cuda.is_available())
