"""What is logged in training is what dense algebra says of that step, in that step and in no other."""

import copy
import csv

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

import lightning_lora as ll
from lightning_lora.analysis.factor_grams import singular_values
from lightning_lora.layers import lora_layers
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, Steps, build, data

CLOSE = {"rel": 1e-6, "abs": 1e-9}  # a Gram matrix has half of the digits


class Memory(Logger):
    """A logger of a user's own."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        own = {key: value for key, value in metrics.items() if key.startswith("lora/")}
        if own:
            assert step not in self.rows
            self.rows[step] = own

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Dense(pl.Callback):
    """The same values, from matrices: by optimizer step, counted from 0."""

    def __init__(self) -> None:
        self.rows, self.squares, self.before = {}, {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.squares = {name: p.grad.square().sum() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parameters = dict(pl_module.named_parameters())
        for adapter_name in ll.adapters(pl_module):
            layers = {n: layer for n, layer in lora_layers(pl_module) if adapter_name in layer.lora}
            each = {n: self.of(layer, adapter_name) for n, layer in layers.items()}
            for name, values in each.items():
                own = [key for key in parameters if key.startswith(f"{name}.lora.{adapter_name}.")]
                values["grad_norm"] = float(sum(self.squares.get(key, 0) for key in own)) ** 0.5
                moved = [(parameters[key].detach() - self.before[key]).square().sum() for key in own if self.before]
                values["step_norm"] = float(sum(moved)) ** 0.5
            row = self.rows.setdefault(trainer.global_step - 1, {})
            for what in next(iter(each.values())):
                values = torch.tensor([each[name][what] for name in each])
                row[f"lora/{adapter_name}/{what}"] = float(
                    values.mean() if what == "effective_rank" else values.square().sum().sqrt()
                )
                row |= {f"lora/{adapter_name}/{name}/{what}": each[name][what] for name in each}
            if f"lora/{adapter_name}/magnitude_drift" in row:
                pairs = [self.magnitudes(layer, adapter_name) for layer in layers.values()]
                now, start = (torch.cat(side) for side in zip(*pairs, strict=True))
                row[f"lora/{adapter_name}/magnitude_drift"] = float((now - start).norm() / start.norm())

    def of(self, layer, adapter_name):
        adapter = layer.lora_adapters()[adapter_name]
        A, B = (factor.detach().double() for factor in adapter.update())
        S = torch.linalg.svdvals(adapter.scaling * B @ A)
        p = S / S.sum()
        values = {
            "effective_rank": float(torch.special.entr(p).sum().exp()),
            "delta_norm": float(S.norm()),
            "A_norm": float(adapter.A.detach().norm()),
            "B_norm": float(adapter.B.detach().norm()),
        }
        if hasattr(adapter, "magnitude"):
            now, start = self.magnitudes(layer, adapter_name)
            values["magnitude_drift"] = float((now - start).norm() / start.norm())
        return values

    def magnitudes(self, layer, adapter_name):
        return layer.lora_adapters()[adapter_name].magnitude.detach(), layer.lora_matrix().norm(dim=1)


def fit(*callbacks, module=None, ckpt_path=None, **options):
    logger, dense = Memory(), Dense()
    defaults = {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {**defaults, "enable_checkpointing": False, "logger": logger, **options}
    trainer = pl.Trainer(callbacks=[*callbacks, dense], **settings)
    trainer.fit(module or Lit(), data(), ckpt_path=ckpt_path)
    return trainer, logger.rows, dense.rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"use_dora": True, "init_lora_weights": "olora"},
        {"rank_pattern": {"blocks.0.q": 5, "blocks.1.o": 2}},
    ],
    ids=str,
)
def test_values_are_those_of_dense_algebra(options):
    lora = ll.LoRA(r=3, lora_alpha=5, adapter_dtype="float64", **options)
    monitor = ll.LoRAMonitor(every_n_steps=3, per_layer=True, gradients=True, updates=True)
    trainer, logged, dense = fit(lora, monitor, module=Lit().double(), precision="64-true")
    assert trainer.global_step == 8
    assert logged.keys() == {2, 5}  # the third and the sixth step, as the Trainer counts them
    for step, row in logged.items():
        assert row == {key: pytest.approx(value, **CLOSE) for key, value in dense[step].items()}
        assert all(row[f"lora/default/{what}"] > 0 for what in ("delta_norm", "grad_norm", "step_norm"))
    last = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("lora/")}
    assert last == pytest.approx(logged[5], rel=1e-6)


def test_two_adapters_and_one_that_is_watched():
    adapters = [
        ll.LoRA(r=3, lora_alpha=5, target_modules=["q"], adapter_name="one"),
        ll.LoRA(r=2, lora_alpha=3, target_modules=["q", "o"], modules_to_save=None, adapter_name="two"),
    ]
    _, logged, dense = fit(*adapters, ll.LoRAMonitor(every_n_steps=4))
    whats = {"effective_rank", "delta_norm", "A_norm", "B_norm"}
    assert logged[3].keys() == {f"lora/{name}/{what}" for name in ("one", "two") for what in whats}
    assert logged[7] == {key: pytest.approx(dense[7][key], rel=1e-4, abs=1e-7) for key in logged[7]}
    adapters = [copy.copy(adapter) for adapter in adapters]
    _, logged, _ = fit(*adapters, ll.LoRAMonitor(every_n_steps=4, adapter_names=["two"]))
    assert logged[3].keys() == {f"lora/two/{what}" for what in whats}


def test_the_step_of_accumulated_batches_and_of_a_resumed_run(tmp_path):
    lora = {"r": 3, "lora_alpha": 5}
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 50}
    monitor = ll.LoRAMonitor(every_n_steps=2, gradients=True, updates=True)
    trainer, logged, dense = fit(ll.LoRA(**lora), monitor, max_epochs=4, **options)
    assert trainer.global_step == 8
    assert logged.keys() == {1, 3, 5, 7}
    assert logged[5] == {key: pytest.approx(dense[5][key], rel=1e-4, abs=1e-7) for key in logged[5]}
    half = fit(ll.LoRA(**lora), max_epochs=2, **options)[0]
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = ll.LoRAMonitor(every_n_steps=2, gradients=True, updates=True)
    _, logged, dense = fit(ll.LoRA(**lora), again, max_epochs=4, ckpt_path=tmp_path / "half.ckpt", **options)
    assert logged.keys() == {5, 7}
    assert logged[7] == {key: pytest.approx(dense[7][key], rel=1e-4, abs=1e-7) for key in logged[7]}


def test_a_run_is_the_same_with_and_without(tmp_path):
    def trained(*more):
        module = Lit()
        fit(ll.LoRA(r=3, lora_alpha=5, lora_dropout=0.1, use_dora=True), *more, module=module)
        return ll.adapter_state_dict(module)

    torch.manual_seed(5)
    without = trained()
    torch.manual_seed(5)
    monitored = trained(ll.LoRAMonitor(every_n_steps=1, per_layer=True, gradients=True, updates=True))
    assert all(torch.equal(value, monitored[key]) for key, value in without.items())


def test_on_a_4_bit_base_and_for_a_logger_of_lightning(tmp_path):
    lora = ll.LoRA(r=3, lora_alpha=5, use_dora=True, quantization="nf4")
    logger = CSVLogger(tmp_path)
    fit(lora, ll.LoRAMonitor(every_n_steps=3), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("lora/default/magnitude_drift")]
    assert [row["step"] for row in rows] == ["2", "5"]
    assert 0 < float(rows[0]["lora/default/magnitude_drift"]) < 0.1


def test_the_other_package():
    class Module(Steps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[ll.LoRAMonitor(every_n_steps=2), ll.LoRA(r=2)],
    )  # fmt: skip
    trainer.fit(Module(), data())
    assert float(trainer.callback_metrics["lora/default/effective_rank"]) > 1


def test_in_a_lightning_cli(monkeypatch):
    class Module(Steps, pl.LightningModule):
        configure_optimizers = pl.LightningModule.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def train_dataloader(self):
            return data()

    monkeypatch.setattr("sys.argv", ["program"])
    arguments = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"]
    arguments += [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        "--optimizer=torch.optim.AdamW",
    ]
    arguments += ["--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.r=2"]
    arguments += ["--trainer.callbacks+=lightning_lora.LoRAMonitor", "--trainer.callbacks.every_n_steps=2"]
    cli = LightningCLI(Module, args=arguments, save_config_callback=None, seed_everything_default=1)
    assert "lora/default/delta_norm" in cli.trainer.callback_metrics


def test_bad_arguments_and_runs():
    with pytest.raises(ll.ConfigError) as caught:
        ll.LoRAMonitor(every_n_steps=0, adapter_names="default", per_layer="yes", gradients=1, updates=None)
    assert str(caught.value).startswith("LoRAMonitor: 5 problems:")
    with pytest.raises(
        ll.ConfigError, match=r"no adapters with A and B that are trained: add ll\.LoRA\(\.\.\.\) to the callbacks"
    ):
        fit(ll.LoRAMonitor())
    with pytest.raises(ll.ConfigError, match="there is no adapter 'defalt'. Did you mean 'default'"):
        fit(ll.LoRA(r=2), ll.LoRAMonitor(adapter_names=["defalt"]))


def test_names_that_lightning_overwrites_are_free():
    assert not {"log", "log_dict"} & {*vars(ll.LoRAMonitor()), *vars(ll.LoRAMonitor)}


@pytest.mark.parametrize("rank", [1, 5])
def test_singular_values_from_gram_matrices(rank):
    A, B = torch.randn(3, rank, 40, dtype=torch.float64), torch.randn(3, 30, rank, dtype=torch.float64)
    B[1, :, -1] = 0
    found = singular_values(A @ A.mT, B.mT @ B)
    dense = torch.linalg.svdvals(B @ A)[:, :rank].flip(1)
    assert torch.allclose(found, dense, rtol=1e-7, atol=1e-6)
    assert not singular_values(A @ A.mT, torch.zeros(3, rank, rank).double()).any()


class TwoOptimizers(Steps, pl.LightningModule):
    """One steps behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.automatic_optimization, self.found = build(), False, {}

    def configure_optimizers(self):
        return [torch.optim.SGD(block.parameters(), lr=0.1) for block in self.net.blocks]

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            for name in "qo":
                adapter = self.net.blocks[i].get_submodule(name).lora["default"]
                norms = [p.grad.norm() for p in adapter.parameters()]
                self.found[f"net.blocks.{i}.{name}"] = float(torch.stack(norms).norm())
            optimizer.step()


class Found(pl.Callback):
    """What each batch's gradients were."""

    def __init__(self) -> None:
        self.rows = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows[trainer.fit_loop.epoch_loop._batches_that_stepped] = dict(pl_module.found)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 6])
def test_every_optimizer_of_a_batch_counts(every):
    monitor = ll.LoRAMonitor(every_n_steps=every, per_layer=True, gradients=True, updates=True)
    logger, found = Memory(), Found()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [ll.LoRA(r=3, modules_to_save=None), monitor, found]
    pl.Trainer(accelerator="cpu", max_epochs=2, logger=logger, callbacks=callbacks, **quiet).fit(
        TwoOptimizers(), data()
    )
    assert len(logger.rows) == {1: 8, 2: 8, 3: 5, 4: 4, 6: 2}[every]  # of 16 steps, two a batch
    for step, row in logger.rows.items():
        for key, norm in found.rows[step].items():
            assert row[f"lora/default/{key}/grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert row[f"lora/default/{key}/step_norm"] == pytest.approx(0.1 * norm, rel=1e-3)


def test_a_run_that_diverged_is_told_by_the_checks():
    class Diverges(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    self.net.blocks[0].q.lora["default"].B.fill_(torch.nan)

    with pytest.raises(ll.DeadAdapterError, match="not finite any more. The run diverged"):
        trainer(ll.LoRA(r=3), ll.LoRAMonitor(every_n_steps=1)).fit(Diverges(), data())


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_grams_that_are_not_finite(odd):
    grams = torch.eye(3).repeat(2, 1, 1)
    bad = grams.clone()
    bad[1, 0, 0] = odd
    S = singular_values(bad, grams)
    assert torch.equal(S[0], torch.ones(3))
    assert S[1].isnan().all()
