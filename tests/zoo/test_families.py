"""One life of an adapter on each model family: injected, trained by a real Trainer, saved, loaded, merged."""

import pytest
import torch

import lightning_lora as ll
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_family
def test_all_linear_is_the_same_everywhere(family):
    """On the model itself and inside a LightningModule: every dense linear of the backbone, the head in full."""
    config = ll.LoRAConfig(target_modules=family.target_modules)
    bare, wrapped = ll.plan(family.make(), config), ll.plan(Wrapped(family.make), config)
    assert len(bare.targets) == family.linears
    assert tuple(m.name for m in bare.modules_to_save) == family.heads
    assert [f"net.{t.name}" for t in bare.targets] == [t.name for t in wrapped.targets]
    assert [f"net.{m.name}" for m in bare.modules_to_save] == [m.name for m in wrapped.modules_to_save]
    assert {f"net.{name}": why for name, why in bare.skipped.items()} == wrapped.skipped


@each_family
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_train_save_load_merge(family, use_dora, tmp_path):
    module = Wrapped(family.make)
    batch = family.batch(module.net)
    lora = ll.LoRA(r=4, lora_alpha=6, target_modules=family.target_modules, use_dora=use_dora)
    run = trainer(lora, max_steps=2)
    base = {key: value.clone() for key, value in module.state_dict().items()}
    before = module.eval().net(**batch)
    module.train()
    run.fit(module, one_batch(batch))
    run.save_checkpoint(tmp_path / "a.ckpt")

    trained = ll.adapter_state_dict(module)
    assert trained.keys() == torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items() if key not in trained)
    with torch.no_grad():  # as in a prediction: with gradients sums are rounded in another order
        after = module.eval().net(**batch)
    assert after.loss < before.loss

    other = Wrapped(family.make)
    (predicted,) = trainer(ll.LoRA(**lora_arguments(lora))).predict(
        other, one_batch(batch, 1), ckpt_path=tmp_path / "a.ckpt"
    )
    assert torch.equal(predicted, after.logits)

    report = ll.merge(module)
    assert min(layer.survived for layer in report.layers.values()) > 0.99
    torch.testing.assert_close(module.net(**batch).logits, after.logits, rtol=1e-3, atol=1e-4)
    ll.unmerge(module)
    with torch.no_grad():
        assert torch.equal(module.net(**batch).logits, after.logits)
    ll.merge_and_unload(module)
    assert module.state_dict().keys() == base.keys()


def lora_arguments(lora: ll.LoRA) -> dict[str, object]:
    return {"r": 4, "lora_alpha": 6, "target_modules": lora.config.target_modules, "use_dora": lora.config.use_dora}
