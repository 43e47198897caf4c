"""Optimizers end with exactly the trainable parameters, whoever built them and when; schedulers stay right."""

import bitsandbytes
import pytest
import torch
from torch.optim import SGD, AdamW, lr_scheduler

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, data


def run(optimizers, *, steps: int = 4, lora: dict[str, object] | None = None, **options: object):
    module = Lit(optimizers_=optimizers)
    fit = trainer(ll.LoRA(r=4, **(lora or {})), max_steps=steps, **options)
    fit.fit(module, data())
    return module, fit


def decay_groups(module):
    """As users split them: matrices with weight decay, vectors without."""
    return [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 5e-3},
    ]


def everything(module):
    return AdamW(module.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    "optimizers",
    [
        everything,
        lambda m: AdamW(m.net.parameters(), lr=1e-2),
        lambda m: AdamW(m.named_parameters(), lr=1e-2),
        lambda m: AdamW(m.trainer.model.parameters(), lr=1e-2),
        lambda m: AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2),
        lambda m: AdamW(decay_groups(m), lr=1e-2),
        lambda m: [AdamW(m.parameters(), lr=1e-2)],
        lambda m: ([AdamW(m.parameters(), lr=1e-2)], [lr_scheduler.StepLR(everything(m), 1)][:0]),
        lambda m: {"optimizer": everything(m)},
        lambda m: bitsandbytes.optim.AdamW(m.parameters(), lr=1e-2),
        lambda m: torch.optim.LBFGS(m.parameters(), lr=1e-2),
        lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    ],
    ids=["all", "net", "named", "trainer", "filtered", "groups", "list", "tuple", "dict", "bnb", "lbfgs", "adafactor"],
)  # fmt: skip
def test_however_they_are_built(optimizers):
    module, fit = run(optimizers)
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    (optimizer,) = fit.optimizers
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(trainable)
    assert {id(p) for p in optimizer.state} <= trainable
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


class BuiltEarly(Lit):
    """As LightningCLI does it: optimizer and scheduler exist before any callback runs."""

    def __init__(self, make, schedule=None):
        super().__init__()
        self.early = make(self)
        self.schedule = schedule and schedule(self.early)

    def configure_optimizers(self):
        return ([self.early], [self.schedule]) if self.schedule else self.early


@pytest.mark.parametrize("use_dora", [False, True])
def test_optimizers_built_before_the_adapters(use_dora):
    module = BuiltEarly(lambda m: AdamW(decay_groups(m), lr=1e-2), lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    fit = trainer(ll.LoRA(r=4, use_dora=use_dora))
    fit.fit(module, data())
    decayed, plain = fit.optimizers[0].param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    per_layer = 3 if use_dora else 2
    assert len(decayed["params"]) == 4 * per_layer + 1  # adapters join the group of the weight they adapt
    assert {names[id(p)] for p in plain["params"]} == {"net.head.bias"}
    assert decayed["weight_decay"] == 0.1
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_named_parameters_stay_named():
    module = BuiltEarly(lambda m: AdamW(m.named_parameters(), lr=1e-2))
    fit = trainer(ll.LoRA(r=4, loraplus_lr_ratio=2.0))
    fit.fit(module, data())
    names = {name: id(p) for name, p in module.named_parameters()}
    for group in fit.optimizers[0].param_groups:
        assert [names[name] for name in group["param_names"]] == [id(p) for p in group["params"]]


def test_several_optimizers_keep_their_parts():
    class Two(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

    module = Two(
        optimizers_=lambda m: [AdamW(m.net.blocks[0].parameters(), lr=1e-2), SGD([*m.net.blocks[1].parameters(), *m.net.head.parameters()], lr=0.1)]
    )  # fmt: skip
    fit = trainer(ll.LoRA(r=4, loraplus_lr_ratio=4.0))
    fit.fit(module, data())
    assert [[len(g["params"]) for g in o.param_groups] for o in fit.optimizers] == [[2, 2], [4, 2]]


@pytest.mark.parametrize(
    ("optimizers", "missing"),
    [
        (lambda m: AdamW(m.net.head.parameters(), lr=1e-2), "8 trainable parameters.*net.blocks.0.q.lora.default.A"),
        (lambda m: AdamW([p for b in m.net.blocks for p in b.norm.parameters()], lr=1e-2), "10 trainable parameters"),
        (lambda m: AdamW(m.net.blocks.parameters(), lr=1e-2), "2 trainable parameters.*net.head.weight"),
        (lambda m: None, "10 trainable parameters"),
    ],
    ids=["head-only", "norms-only", "no-head", "none"],
)
def test_what_is_in_no_optimizer_is_an_error(optimizers, missing):
    with pytest.raises(ll.DeadAdapterError, match=missing):
        run(optimizers)


# ---- LoRA+ -----------------------------------------------------------------------------------------------------------

PLUS = {"loraplus_lr_ratio": 16.0}


def ratios(fit) -> list[float]:
    """Learning rates of the B groups over those of the groups that they were split from."""
    groups = fit.optimizers[0].param_groups
    return [g["lr"] / groups[g["lora_split_from"]]["lr"] for g in groups if "lora_lr_ratio" in g]


def test_loraplus_splits_groups():
    module, fit = run(lambda m: AdamW(decay_groups(m), lr=1e-2), lora=PLUS)
    matrices, vectors, split = fit.optimizers[0].param_groups
    assert {id(p) for p in split["params"]} == {id(layer.lora["default"].B) for _, layer in lora_layers(module)}
    assert (len(matrices["params"]), len(vectors["params"])) == (5, 1)
    assert (split["lr"], split["weight_decay"]) == (0.16, 0.1)


@pytest.mark.parametrize("early", [False, True], ids=["in configure_optimizers", "before the adapters"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.5]),
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
        lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
        lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: lr_scheduler.PolynomialLR(o, 10),
        lambda o: lr_scheduler.LinearLR(o, 0.1, 1, 3),
        lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, 1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o, 0.1, 1, 2), lr_scheduler.ExponentialLR(o, 0.9)]),
    ],
    ids=["step", "lambda", "lambdas", "multiplicative", "onecycle", "cyclic", "cosine", "restarts", "polynomial", "linear", "swa", "sequential", "chained"],
)  # fmt: skip
def test_loraplus_keeps_schedulers_right(schedule, early):
    def config(optimizer):
        return {"scheduler": schedule(optimizer), "interval": "step"}

    if early:
        module = BuiltEarly(lambda m: AdamW(decay_groups(m), lr=1e-2), config)
    else:

        def optimizers(m):
            optimizer = AdamW(decay_groups(m), lr=1e-2)
            return {"optimizer": optimizer, "lr_scheduler": config(optimizer)}

        module = Lit(optimizers_=optimizers)
    seen = []

    class Look(ll.LoRA):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append(ratios(trainer)[0])

    fit = trainer(Look(r=4, **PLUS), max_epochs=2)
    fit.fit(module, data())
    assert len(seen) == 8
    assert seen == pytest.approx([16.0] * 8)
    assert len(fit.optimizers[0].param_groups) == 3


def test_loraplus_with_a_plateau():
    def optimizers(m):
        optimizer = AdamW(m.parameters(), lr=1e-2)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, min_lr=[1e-6])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}

    _, fit = run(optimizers, lora=PLUS, steps=-1, max_epochs=3)
    assert fit.optimizers[0].param_groups[0]["lr"] < 1e-2
    assert ratios(fit) == pytest.approx([16.0])


def test_loraplus_is_refused_where_there_is_one_learning_rate():
    with pytest.raises(ll.UnsupportedError, match="LBFGS has one learning rate"):
        run(lambda m: torch.optim.LBFGS(m.parameters(), lr=1e-2), lora=PLUS)


def test_loraplus_trains_as_it_says():
    """With plain SGD a step of B is ratio times what it is without."""
    steps = {}
    for ratio in (None, 8.0):
        torch.manual_seed(0)
        module, _ = run(lambda m: SGD(m.parameters(), lr=1e-2), steps=1, lora={"loraplus_lr_ratio": ratio})
        steps[ratio] = next(layer.lora["default"].B.clone() for _, layer in lora_layers(module))
    torch.testing.assert_close(steps[8.0], 8 * steps[None])


def test_second_fit_with_the_same_optimizer():
    module = BuiltEarly(lambda m: AdamW(m.parameters(), lr=1e-2))
    for epochs in (1, 1):
        fit = trainer(ll.LoRA(r=4, **PLUS), max_epochs=epochs)
        fit.fit(module, data())
        assert [len(g["params"]) for g in fit.optimizers[0].param_groups] == [6, 4]
