"""Optimizers end with exactly the trainable parameters, whoever built them and when; schedulers stay right."""

import bitsandbytes
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.modules import needs_muon, trainer
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


def by_hand(base):
    """Steps all optimizers of a module, which Lightning leaves to the module if there are several."""

    class ByHand(base):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

    return ByHand


def test_several_optimizers_keep_their_parts():
    module = by_hand(Lit)(
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


# ---- optimizers that take some tensors only -------------------------------------------------------------------------------


def matrices(module, trained=False):
    return [p for p in module.parameters() if p.ndim == 2 and (p.requires_grad or not trained)]


def vectors(module):
    return [p for p in module.parameters() if p.ndim != 2]


@needs_muon
@pytest.mark.parametrize(
    ("lora", "sizes"),
    [({}, [9, 1]), ({"use_dora": True}, [9, 5]), ({"bias": "all"}, [9, 7]), ({"train_norms": True}, [9, 5])],
    ids=["lora", "dora", "bias", "norms"],
)
@pytest.mark.parametrize("early", [False, True], ids=["in configure_optimizers", "before the adapters"])
def test_muon_has_the_matrices_and_another_one_the_vectors(lora, sizes, early):
    def optimizers(module):
        return [torch.optim.Muon(matrices(module), lr=1e-2), AdamW(vectors(module), lr=1e-2)]

    module = by_hand(BuiltEarly)(optimizers) if early else by_hand(Lit)(optimizers_=optimizers)
    fit = trainer(ll.LoRA(r=4, **lora))
    fit.fit(module, data())
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in fit.optimizers] == sizes
    assert {p.ndim for p in fit.optimizers[0].param_groups[0]["params"]} == {2}
    adapters = [layer.lora["default"] for _, layer in lora_layers(module)]
    assert all(adapter.B.count_nonzero() for adapter in adapters)


@needs_muon
def test_vectors_of_layers_without_a_bias_join_those_of_other_layers():
    """Of several groups that could have them it is that of vectors."""

    def optimizers(module):
        norms = [p for p in module.parameters() if p.ndim == 1]
        head = [module.net.head.weight]
        others = [p for p in matrices(module) if p is not head[0]]
        return [torch.optim.Muon(others, lr=1e-2), AdamW([{"params": head}, {"params": norms}], lr=1e-2)]

    class NoBias(by_hand(BuiltEarly)):
        def __init__(self):
            super().__init__(lambda m: None)
            for block in self.net.blocks:
                block.q.bias = block.o.bias = None
            self.early = optimizers(self)

    module = NoBias()
    fit = trainer(ll.LoRA(r=4, use_dora=True))
    fit.fit(module, data())
    assert [[len(g["params"]) for g in o.param_groups] for o in fit.optimizers] == [[8], [1, 5]]


@needs_muon
@pytest.mark.parametrize(
    ("lora", "lost"),
    [
        ({"use_dora": True, "modules_to_save": None}, r"4 trainable .*net.blocks.0.q.lora.default.magnitude"),
        ({"bias": "lora_only", "modules_to_save": None}, r"4 trainable .*net.blocks.0.q.bias"),
        ({}, r"1 trainable .*net.head.bias"),
    ],
    ids=["dora", "bias", "head"],
)
@pytest.mark.parametrize("early", [False, True], ids=["in configure_optimizers", "before the adapters"])
def test_what_muon_does_not_take_is_named(lora, lost, early):
    def optimizers(module):
        return torch.optim.Muon(matrices(module))

    module = BuiltEarly(optimizers) if early else Lit(optimizers_=optimizers)
    with pytest.raises(ll.DeadAdapterError, match=f"{lost}.* second optimizer .*Muon takes matrices only.*use_dora"):
        trainer(ll.LoRA(r=4, **lora)).fit(module, data())


@needs_muon
def test_muon_over_all_parameters_gets_a_note():
    with pytest.raises(ValueError, match="Muon only supports 2D") as caught:
        run(lambda m: torch.optim.Muon(m.parameters()))
    assert any("p.requires_grad and p.ndim == 2" in note for note in caught.value.__notes__)
    module, _ = run(lambda m: torch.optim.Muon(matrices(m, trained=True)), lora={"modules_to_save": None, **PLUS})
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


class Sparse(by_hand(BuiltEarly)):
    """An embedding whose own gradients are sparse; those of an adapter on it are not."""

    def __init__(self, early):
        super().__init__(lambda m: None)
        embedding = nn.Embedding(50, 16, sparse=True)
        self.net = nn.Sequential(embedding, nn.Linear(16, 16), nn.Linear(16, 4))
        self.early = self.made() if early else None

    def made(self):
        return [torch.optim.SparseAdam(self.net[0].parameters()), AdamW(self.net[1:].parameters())]

    def configure_optimizers(self):
        return self.early or self.made()

    def loss(self, batch):
        tokens = batch[0][:, :3].abs().mul(10).long().clamp(max=49)
        return nn.functional.cross_entropy(self.net(tokens).mean(1), batch[1])


def test_sparse_adam_gets_no_adapters():
    lora = ll.LoRA(r=4, target_modules=["net.0", "net.1"], modules_to_save=None)
    fit = trainer(lora)
    fit.fit(Sparse(early=True), data())
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in fit.optimizers] == [0, 4]
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense") as caught:
        trainer(lora).fit(Sparse(early=False), data())
    assert any("give them to another optimizer" in note for note in caught.value.__notes__)


def test_an_optimizer_that_scales_by_the_norm_of_what_is_0():
    with pytest.raises(ll.DeadAdapterError, match="left it at 0. Check the optimizer .LARS and LAMB"):
        run(lambda m: bitsandbytes.optim.LAMB(m.parameters(), lr=1e-2))


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


class WarmsUp(Lit):
    """As Lightning's documentation does it by hand."""

    follows = False

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + batch_idx) * (group.get("lora_lr_ratio", 1) if self.follows else 1)


def test_loraplus_and_learning_rates_that_are_set_by_hand():
    module = WarmsUp(optimizers_=everything)
    with pytest.warns(UserWarning, match=r"loraplus_lr_ratio has no effect: .* \(0.001\).*get\('lora_lr_ratio', 1\)"):
        trainer(ll.LoRA(r=4, **PLUS), max_steps=2).fit(module, data())
    module.follows = True
    fit = trainer(ll.LoRA(r=4, **PLUS))
    fit.fit(module, data())
    assert ratios(fit) == pytest.approx([16.0])


def test_loraplus_and_the_names_of_groups(tmp_path):
    """As LearningRateMonitor logs them, which takes no name twice."""

    def optimizers(module):
        return AdamW([{**group, "name": name} for group, name in zip(decay_groups(module), "mv", strict=True)], lr=1e-2)

    callbacks = [ll.LoRA(r=4, adapter_name=name, modules_to_save=None, **PLUS) for name in ("first", "second")]
    monitor = LearningRateMonitor()
    fit = trainer(*callbacks, monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(Lit(optimizers_=optimizers), data())
    assert monitor.lrs.keys() == {f"lr-AdamW/{name}" for name in ("m", "v", "m.first.B", "m.second.B")}


# ---- a second fit with the same optimizer ---------------------------------------------------------------------------------


def test_second_fit_with_the_same_optimizer():
    module = BuiltEarly(lambda m: AdamW(m.parameters(), lr=1e-2))
    for epochs in (1, 1):
        fit = trainer(ll.LoRA(r=4, **PLUS), max_epochs=epochs)
        fit.fit(module, data())
        assert [len(g["params"]) for g in fit.optimizers[0].param_groups] == [6, 4]


@pytest.mark.parametrize("then", [2.0, None, 16.0])
@pytest.mark.parametrize("schedule", [None, lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch)])
def test_a_second_fit_has_its_own_ratio(then, schedule):
    module = BuiltEarly(lambda m: SGD(m.parameters(), lr=1e-2), schedule)
    trainer(ll.LoRA(r=4, **PLUS)).fit(module, data())
    fit = trainer(ll.LoRA(r=4, loraplus_lr_ratio=then), max_epochs=2)
    fit.fit(module, data())
    (a, b), wanted = fit.optimizers[0].param_groups, then or 1.0
    assert b["lr"] == pytest.approx(wanted * a["lr"])
    assert a["lr"] == pytest.approx(1e-2 if schedule is None else 1e-2 * 0.5**3)
    if schedule is not None:
        assert module.schedule.base_lrs == pytest.approx([1e-2, wanted * 1e-2])
        assert module.schedule.get_last_lr() == pytest.approx([a["lr"], b["lr"]])


@pytest.mark.parametrize("ratios_", [(None, None), (16.0, 4.0), (None, 4.0), (16.0, None)])
def test_a_second_fit_trains_another_adapter(ratios_):
    """Weights that were frozen have left the optimizer in the first one."""
    module = BuiltEarly(lambda m: AdamW(m.named_parameters(), lr=1e-2))
    for name, ratio in zip(("first", "second"), ratios_, strict=True):
        fit = trainer(ll.LoRA(r=4, adapter_name=name, modules_to_save=None, loraplus_lr_ratio=ratio))
        fit.fit(module, data())
    names = {id(p): name for name, p in module.named_parameters()}
    for group in fit.optimizers[0].param_groups:
        assert [names[id(p)] for p in group["params"]] == group["param_names"]
        for name in group["param_names"]:
            assert ".second." in name
            assert group["lr"] == pytest.approx(1e-2 * (ratios_[1] or 1.0 if name.endswith(".B") else 1.0))
    assert all(layer.lora["second"].B.count_nonzero() for _, layer in lora_layers(module))


def test_an_optimizer_that_made_steps_before_the_adapters_came(tmp_path):
    """What it knew of the base is no longer there."""
    module = BuiltEarly(lambda m: AdamW(m.parameters(), lr=1e-2))
    module.loss(next(iter(data()))).backward()
    module.early.step()
    module.early.zero_grad()
    assert module.early.state
    fit = trainer(ll.LoRA(r=2))
    fit.fit(module, data())
    assert {id(p) for p in module.early.state} <= {id(p) for g in module.early.param_groups for p in g["params"]}
    fit.save_checkpoint(tmp_path / "a.ckpt")


def test_loraplus_in_a_warm_up_from_zero():
    """A learning rate of 0 is no sign that somebody set those of B."""
    module = BuiltEarly(
        lambda m: AdamW(m.parameters(), lr=1e-2),
        lambda o: {"scheduler": lr_scheduler.LambdaLR(o, lambda step: float(step >= 3)), "interval": "step"},
    )
    trainer(ll.LoRA(r=2, loraplus_lr_ratio=4.0), max_epochs=3).fit(module, data())


@pytest.mark.parametrize(
    ("optimizer", "schedule", "batches"),
    [
        (AdamW, lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8, final_div_factor=10), 7),
        (lambda p, lr: SGD(p, lr, momentum=0.9), lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=4), 3),
    ],
    ids=["end of onecycle", "momentum of cyclic"],
)
def test_loraplus_keeps_what_schedulers_know_of_groups(optimizer, schedule, batches):
    module = BuiltEarly(
        lambda m: optimizer(m.parameters(), lr=1e-2), lambda o: {"scheduler": schedule(o), "interval": "step"}
    )
    fit = trainer(ll.LoRA(r=2, loraplus_lr_ratio=16.0), max_epochs=1)
    fit.fit(module, DataLoader([next(iter(data()))] * batches, batch_size=None))
    plain, split = fit.optimizers[0].param_groups
    assert split["lr"] == pytest.approx(16 * plain["lr"])
    assert plain.get("momentum") == split.get("momentum")
    assert "momentum" not in plain or plain["momentum"] != 0.9


def test_loraplus_leaves_schedules_of_other_optimizers_alone():
    def optimizers(m):
        head = [{"params": [m.net.head.weight]}, {"params": [m.net.head.bias], "lr": 1e-3}]
        both = AdamW(m.net.blocks.parameters(), lr=1e-2), SGD(head, lr=1e-1)
        return [*both], [lr_scheduler.StepLR(each, 100) for each in both]

    module = by_hand(Lit)(optimizers_=optimizers)
    fit = trainer(ll.LoRA(r=2, loraplus_lr_ratio=16.0))
    fit.fit(module, data())
    assert [group["lr"] for group in fit.optimizers[1].param_groups] == [1e-1, 1e-3]
    assert module.lr_schedulers()[1].base_lrs == [1e-1, 1e-3]
