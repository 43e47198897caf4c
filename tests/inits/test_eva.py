"""EVA: A from the data that a run is going to see, ranks by what they explain, once, and nothing else disturbed."""

import copy
import json
import random
import warnings
from collections import Counter

import lightning.pytorch as pl
import numpy
import peft
import pytest
import pytorch_lightning
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset

import lightning_lora as ll
from lightning_lora.inits import EVA
from lightning_lora.layers import lora_layers
from lightning_lora.ops.spread import Share, spread
from lightning_lora.ops.streaming import PrincipalRows
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, trainer
from tests.helpers.toy import Lit, Steps, build, data

FAMILY = FAMILIES["llama"]


def batches(n: int = 4, size: int = 3, length: int = 11) -> list[dict[str, torch.Tensor]]:
    """Sequences with padding, of which the labels leave out a part."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(n):
        tokens = torch.randint(3, 61, (size, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(6, length, (size, 1), generator=generator)).long()
        labels = tokens.masked_fill((mask == 0) | (torch.arange(length) < 2), -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def counted(part: dict[str, torch.Tensor]) -> torch.Tensor:
    return part["attention_mask"].bool() & (part["labels"] != -100)


def inputs_of(model: nn.Module, names: list[str], parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What layers get, at the positions that count, all kept: what EVA must not need."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    masks: list[torch.Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0][masks[-1]])
        )
        for name in names
    ]
    with torch.no_grad():
        for part in parts:
            masks.append(counted(part))
            model.eval()(**part)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in found.items()}


def overlap(A: torch.Tensor, B: torch.Tensor) -> float:
    """The cosine of the largest angle between what two sets of orthonormal rows span."""
    return torch.linalg.svdvals(A.double() @ B.double().T)[-1].item()


def eva(model, parts, r=4, forward=None, **options):
    init = EVA(**{"tau": 1.0, **options})
    ll.inject(model, ll.LoRAConfig(r=r, lora_alpha=6, modules_to_save=None, init_lora_weights=init))
    return ll.initialise_from_data(model, parts, forward=forward)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[40] * 5, [3, 1, 60, 2, 50], [200]], ids=str)
@pytest.mark.parametrize("at_a_time", [1 << 13, 64])
def test_streaming_gives_the_components_of_all_rows(sizes, at_a_time, monkeypatch):
    monkeypatch.setattr("lightning_lora.ops.streaming.ROWS", at_a_time)
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(1, -2, 24, dtype=torch.float64)
    X = torch.randn(sum(sizes), 24, generator=generator, dtype=torch.float64) * scales + 3
    stream = PrincipalRows(6)
    for part in X.split(sizes):
        stream.add(part)
    centred = X - X.mean(0)
    _, S, V = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(stream.mean, X.mean(0))
    torch.testing.assert_close(stream.S[:6], S[:6], rtol=1e-3, atol=0)
    assert overlap(stream.V[:6], V[:6]) > 0.9999
    assert stream.total == pytest.approx(centred.square().sum().item())
    wanted = (S.square() / S.square().sum())[:6].tolist()
    assert stream.shares(6) == pytest.approx(wanted, rel=2e-3)


def test_streams_of_several_processes_merge():
    X = torch.randn(120, 20, generator=torch.Generator().manual_seed(1)) * torch.logspace(1, -2, 20)
    streams = [PrincipalRows(20) for _ in range(3)]
    for stream, part in zip(streams, X.split([50, 60, 10]), strict=True):
        stream.add(part)
    streams[0].merge(streams[1])
    streams[0].merge(streams[2])
    streams[0].merge(PrincipalRows(20))
    S = torch.linalg.svdvals(X - X.mean(0))
    torch.testing.assert_close(streams[0].S, S, rtol=1e-4, atol=1e-4)
    assert streams[0].rows == 120


def test_ranks_go_where_they_explain_most():
    layers = {"a": Share([0.5, 0.2, 0.1]), "b": Share([0.4, 0.3]), "c": Share([0.01])}
    assert spread(layers, 4) == {"a": 2, "b": 2, "c": 0}
    assert spread(layers, 99) == {"a": 3, "b": 2, "c": 1}
    costly = {"a": Share([9.0, 8.0], cost=10), "b": Share([1.0, 1.0, 0.1], cost=1, least=1)}
    assert spread(costly, 11) == {"a": 1, "b": 1} or spread(costly, 11) == {"a": 0, "b": 3}
    assert sum(costly[n].cost * r for n, r in spread(costly, 11).items()) <= 11


@pytest.mark.parametrize("whiten", [False, True])
def test_the_start_is_the_svd_of_the_inputs(whiten):
    """Against an SVD of all of them at once."""
    model = FAMILY.make().double()
    plan = eva(model, batches(), rho=1.0, whiten=whiten)
    names = [target.name for target in plan.targets]
    seen = inputs_of(FAMILY.make().double(), names, batches())
    for name in names:
        adapter = model.get_submodule(name).lora["default"]
        _, S, V = torch.linalg.svd(seen[name] - seen[name].mean(0), full_matrices=False)
        A = adapter.A.detach() * (S[:4, None].sqrt() if whiten else 1)
        torch.testing.assert_close(A @ A.T, torch.eye(4).double(), rtol=0.03, atol=0.03)
        assert overlap(torch.linalg.qr(A.T).Q.T, V[:4]) > 0.99
        assert not adapter.B.any()
        assert adapter.r == 4


def test_is_pefts():
    """The same subspaces and the same ranks on the same data, that PEFT gets in one batch and we in four."""
    parts = batches()
    model = FAMILY.make()
    plan = eva(model, parts)
    twin = FAMILY.make()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=sorted({t.name.rpartition(".")[2] for t in plan.targets}),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, config)
        peft.initialize_lora_eva_weights(theirs, [joined(parts)], show_progress_bar=False)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = {target.name: target for target in plan.targets}
    assert sum(t.r for t in plan.targets) == 4 * 14
    ranks = {name: layers[name].r["default"] if name in layers else 0 for name in ours}
    # siblings have the same input and so the same shares: which of them gets the last one is any one's choice
    groups = {
        name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_") for name in ours
    }
    totals = [Counter(), Counter()]
    for name in ours:
        totals[0][groups[name]] += ours[name].r
        totals[1][groups[name]] += ranks[name]
    assert totals[0] == totals[1]
    assert len(set(ranks.values())) > 1
    for name, target in ours.items():
        common = min(target.r, ranks[name])
        A = model.get_submodule(name).lora["default"].A[:common]
        assert overlap(A.detach(), layers[name].lora_A["default"].weight[:common].detach()) > 0.98
        if target.r == ranks[name]:
            assert model.get_submodule(name).lora["default"].scaling == pytest.approx(layers[name].scaling["default"])


def test_pefts_own_is_read(tmp_path):
    """A folder that PEFT wrote of an adapter whose ranks EVA spread."""
    targets = ["q_proj", "o_proj", "down_proj"]
    options = {"target_modules": targets, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
    config = peft.LoraConfig(r=4, lora_alpha=6, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(FAMILY.make(), config)
        peft.initialize_lora_eva_weights(theirs, [joined(batches())], show_progress_bar=False)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(tmp_path / "peft")
    model, part = FAMILY.make(), batches(1)[0]
    ll.load_adapter(model, tmp_path / "peft")
    assert len(set(ranks(model).values())) > 1
    torch.testing.assert_close(model.eval()(**part).logits, theirs.eval()(**part).logits)


def test_padding_and_what_labels_leave_out_do_not_count():
    parts = batches()
    spoilt = copy.deepcopy(parts)
    for part in spoilt:
        part["input_ids"][part["attention_mask"] == 0] = 7
    first, second, third = (FAMILY.make() for _ in range(3))
    eva(first, parts)
    eva(second, spoilt)
    eva(third, parts, use_label_mask=False)
    for (_, a), (_, b), (_, c) in zip(lora_layers(first), lora_layers(second), lora_layers(third), strict=True):
        assert overlap(a.lora["default"].A.detach(), b.lora["default"].A.detach()) > 0.999
        assert overlap(a.lora["default"].A.detach(), c.lora["default"].A.detach()) < 0.99


def test_it_ends_when_nothing_changes_any_more():
    taken = []

    def stream():
        for i in range(50):
            taken.append(i)
            yield {**batches(1)[0]}

    eva(FAMILY.make(), stream(), tau=0.999)
    assert len(taken) < 6
    taken.clear()
    eva(FAMILY.make(), stream(), tau=1.0, batches=9)
    assert len(taken) <= 10


# ---- what it leaves alone --------------------------------------------------------------------------------------------


class Drawing(Dataset):
    """A dataset that draws, from all generators there are."""

    def __init__(self) -> None:
        self.own = numpy.random.default_rng(3)
        self.python = random.Random(4)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int):
        scale = 1 + 0.1 * (self.own.random() + self.python.random() + numpy.random.rand() + random.random())
        x = torch.randn(16) * scale * torch.linspace(1, 3, 16)
        return x, int(x[:4].argmax())


class Counting(Lit):
    """A module that counts, logs and keeps statistics in its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(build(), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4))
        self.accuracy = torchmetrics.MeanMetric()
        self.register_buffer("steps", torch.zeros(()))
        self.order: list[float] = []
        self.modes: list[bool] = []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.accuracy.update(batch[0].mean())
        self.modes.append(self.net.training)
        self.log("acc", self.accuracy)
        if self.net.training:
            self.order.append(batch[0].sum().item())
        return super().training_step(batch, batch_idx)


def run(init, epochs=1, **options):
    pl.seed_everything(3, verbose=False)
    module = Counting()
    loader = DataLoader(Drawing(), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(8))
    lora = ll.LoRA(
        r=3, lora_alpha=5, init_lora_weights=init, target_modules=["q", "o"], modules_to_save=None, **options
    )
    fit = trainer(lora, max_epochs=epochs)
    fit.fit(module, loader)
    return module, fit


def test_the_run_is_what_it_is_without():
    """The same batches in the same order with the same noise: only the factors differ."""
    plain, without = run("kaiming")
    module, fit = run(EVA(rho=1.0, batches=3))
    assert module.order == plain.order
    assert len(module.order) == 4
    assert module.modes[:4] == [False] * 4, "three batches and one look at which inputs are the same"
    assert module.modes[4:] == [True] * 4
    assert module.steps == 4
    assert fit.callback_metrics.keys() == without.callback_metrics.keys()
    assert module.accuracy._update_count == plain.accuracy._update_count
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for _, layer in lora_layers(module))
    assert "log" not in vars(module)
    state = plain.state_dict()
    for key in ("net.1.running_mean", "net.1.running_var", "net.0.blocks.0.q.weight", "steps"):
        assert torch.equal(module.state_dict()[key], state[key])


def test_random_streams_and_gradients_by_hand():
    model = build().train()
    model.blocks[0].drop.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    eva(model, DataLoader(Drawing(), batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert [m.training for m in model.modules()].count(False) == 1
    assert not model.blocks[0].drop.training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora.default.{key}" for name, _ in lora_layers(model) for key in "AB"
    }


# ---- in runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that used EVA, and its checkpoints after each of two epochs."""
    folder = tmp_path_factory.mktemp("eva")
    module = Wrapped(FAMILY.make)
    torch.manual_seed(0)
    lora = ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None, save_peft=True)
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(lora, checkpoint, max_epochs=2)
    fit.fit(module, DataLoader(batches(), batch_size=None))
    return module, folder


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.lora["default"].r for name, layer in lora_layers(model)}


def test_it_starts_as_the_base():
    model, base = FAMILY.make().double(), FAMILY.make().double()
    eva(model, batches())
    part = batches(1)[0]
    assert torch.equal(model.eval()(**part).logits, base.eval()(**part).logits)
    assert len(set(ranks(model).values())) > 1
    assert sum(ranks(model).values()) == 4 * 14
    assert all(layer.lora["default"].scaling == pytest.approx(1.5) for _, layer in lora_layers(model))


def test_the_callback_and_the_function_do_the_same(trained):
    model = Wrapped(FAMILY.make)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None))
    plan = ll.initialise_from_data(model, batches(), forward=lambda m, batch: m.net(**batch))
    assert {t.name: t.r for t in plan.targets} == ranks(trained[0]) == ranks(model)
    assert ll.adapters(model)["default"].to_dict() == ll.adapters(trained[0])["default"].to_dict()
    assert ll.plan(Wrapped(FAMILY.make), ll.adapters(model)["default"]).targets == plan.targets


def test_a_run_that_goes_on_does_not_look_again(trained, monkeypatch):
    module, folder = trained
    twin = Wrapped(FAMILY.make)
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)  # to call it is an error
    lora = ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None)
    fit = trainer(lora, max_epochs=2)
    fit.fit(twin, DataLoader(batches(), batch_size=None), ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
    own, other = ll.adapter_state_dict(module), ll.adapter_state_dict(twin)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    fit.fit_loop.max_epochs = 3  # in the same process
    fit.fit(twin, DataLoader(batches(), batch_size=None))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_looks_at_no_data(trained, stage, monkeypatch):
    module, folder = trained
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)
    loader = DataLoader(batches(1), batch_size=None)
    outcomes = []
    for checkpoint in (folder / "epoch=1.ckpt", None):
        twin = Wrapped(FAMILY.make)
        run = trainer(ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None))
        result = getattr(run, stage)(twin, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        outcomes.append(result)
        assert bool(ll.adapters(twin)) == (checkpoint is not None)
    with torch.no_grad():
        own = module.net.eval()(**batches(1)[0])
        base = FAMILY.make().eval()(**batches(1)[0])
    for outcome, wanted in zip(outcomes, (own, base), strict=True):
        if stage == "predict":
            torch.testing.assert_close(outcome[0], wanted.logits)
        else:
            assert next(iter(outcome[0].values())) == pytest.approx(wanted.loss.item(), rel=1e-5)


def test_a_fit_after_an_evaluation_looks_at_the_data():
    module = Wrapped(FAMILY.make)
    run = trainer(ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None))
    loader = DataLoader(batches(), batch_size=None)
    run.validate(module, loader)
    run.fit(module, loader)
    assert len(set(ranks(module).values())) > 1


def test_what_is_saved_is_read_everywhere(trained):
    module, folder = trained
    part = batches(1)[0]
    own = module.net.eval()(**part).logits
    assert (own - FAMILY.make().eval()(**part).logits).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.PeftModel.from_pretrained(FAMILY.make(), str(folder / "epoch=1.peft")).eval()
    torch.testing.assert_close(twin(**part).logits, own)
    for source in ("epoch=1.peft", "epoch=1.ckpt"):
        other = Wrapped(FAMILY.make)
        ll.load_adapter(other, folder / source)
        assert torch.equal(other.net.eval()(**part).logits, own)
        assert ranks(other) == ranks(module)
    loaded = ll.load_from_checkpoint(Wrapped, folder / "epoch=1.ckpt", build=FAMILY.make)
    assert torch.equal(loaded.net.eval()(**part).logits, own)
    merged = ll.merge_and_unload(copy.deepcopy(module)).net
    torch.testing.assert_close(merged.eval()(**part).logits, own)


@pytest.mark.filterwarnings("ignore:.*never moved")  # at a learning rate of 0
def test_a_run_starts_from_a_folder_without_a_look(trained, monkeypatch):
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)
    for source in ("epoch=1.peft", "epoch=1.ckpt"):
        module = Wrapped(FAMILY.make, lr=0.0)
        lora = ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None, init_from=trained[1] / source)
        run = trainer(lora)
        run.fit(module, DataLoader(batches(), batch_size=None))
        assert ranks(module) == ranks(trained[0])
        own, other = ll.adapter_state_dict(trained[0]), ll.adapter_state_dict(module)
        assert all(torch.equal(own[key], other[key]) for key in own)
        run.validate(module, DataLoader(batches(1), batch_size=None))


@pytest.mark.filterwarnings("ignore:.*never moved")  # at a learning rate of 0
@pytest.mark.parametrize("source", ["epoch=1.peft", "epoch=1.ckpt"])
def test_a_fit_goes_on_with_what_was_loaded(trained, source, monkeypatch):
    """The configuration that the run had says no ranks, and the file has those that data gave."""
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)
    module = Wrapped(FAMILY.make, lr=0.0)
    ll.load_adapter(module, trained[1] / source)
    before = ll.adapter_state_dict(module)
    options = {"init_lora_weights": "eva", "modules_to_save": None}
    run = trainer(ll.LoRA(r=4, lora_alpha=6, **options))
    run.fit(module, DataLoader(batches(), batch_size=None))
    assert ranks(module) == ranks(trained[0])
    after = ll.adapter_state_dict(module)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    run.fit(module, DataLoader(batches(), batch_size=None))
    for other in ({"r": 8, "lora_alpha": 12}, {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 6, "use_dora": True}):
        ll.load_adapter(again := Wrapped(FAMILY.make), trained[1] / source)
        with pytest.raises(ll.ConfigError, match="already has an adapter 'default'"):
            trainer(ll.LoRA(**other, **options)).fit(again, DataLoader(batches(), batch_size=None))


def test_another_rank_is_still_refused(trained):
    twin = Wrapped(FAMILY.make)
    run = trainer(ll.LoRA(r=8, lora_alpha=6, init_lora_weights="eva", modules_to_save=None))
    with pytest.raises(ll.CheckpointError, match="r: 4 -> 8"):
        run.fit(twin, DataLoader(batches(), batch_size=None), ckpt_path=trained[1] / "epoch=0.ckpt", weights_only=True)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "quantization": "nf4"}], ids=str)
def test_with_variants_and_packed_bases(options):
    module = Wrapped(FAMILY.make)
    lora = ll.LoRA(r=4, lora_alpha=6, init_lora_weights="eva", modules_to_save=None, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*bitsandbytes|.*blocksize|.*quantised|.*Some matrices")
        trainer(lora).fit(module, DataLoader(batches(), batch_size=None))
    assert sum(ranks(module).values()) == 4 * 14
    assert len({round(layer.lora["default"].scaling, 9) for _, layer in lora_layers(module)}) == 1
    assert all(layer.lora["default"].B.any() for _, layer in lora_layers(module))


def test_a_layer_that_explains_nothing_loses_its_adapter(tmp_path):
    """One whose inputs never change, beside such that do."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.varied, self.conv = nn.Linear(16, 4), nn.Linear(16, 4), nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return self.constant(torch.ones(len(x), 16)) + self.varied(self.conv(x[:, None])[:, :, :8].flatten(1))

    torch.manual_seed(0)
    model = Net()
    targets = ["constant", "varied", "conv"]
    config = ll.LoRAConfig(r=2, init_lora_weights="eva", target_modules=targets, modules_to_save=None)
    ll.inject(model, config)
    plan = ll.initialise_from_data(model, [torch.randn(20, 16) for _ in range(3)])
    assert {t.name: t.r for t in plan.targets} == {"varied": 4, "conv": 2}
    assert type(model.constant) is nn.Linear
    assert model.conv.lora["default"].A.any(), "a convolution starts as by default"
    assert plan.skipped["constant"] == "exclude_modules"
    ll.save_adapter(model, tmp_path / "peft")
    torch.manual_seed(0)
    other = Net()
    ll.load_adapter(other, tmp_path / "peft")
    assert ranks(other) == {"varied": 4, "conv": 2}
    ll.inject(model, config)
    assert type(model.constant) is nn.Linear, "what was settled stays settled"


@pytest.mark.parametrize("options", [{"init_lora_weights": "eva"}, {"rank_pattern": "auto"}], ids=str)
def test_layers_that_no_batch_reaches_are_named(options):
    model = build()
    model.spare = nn.Linear(16, 16)
    ll.inject(model, ll.LoRAConfig(r=4, modules_to_save=None, **options))
    with pytest.warns(UserWarning, match="spare: no batch reached them: they keep their rank"):
        ll.initialise_from_data(model, [torch.randn(20, 16)], forward=lambda net, x: net(x).square().mean())
    assert model.spare.lora["default"].r == 4
    assert model.spare.lora["default"].A.any()


@pytest.mark.parametrize("options", [{"init_lora_weights": "eva"}, {"rank_pattern": "auto"}], ids=str)
def test_stacks_and_what_is_read_start_as_by_default(options):
    family = FAMILIES["mixtral"]
    model = family.make()
    ll.inject(model, ll.LoRAConfig(r=3, target_parameters="experts", modules_to_save=None, **options))
    plan = ll.initialise_from_data(model, [family.batch(model) for _ in range(3)])
    found = {t.name: t.r for t in plan.targets}
    experts = [name for name in found if "experts" in name]
    assert len(experts) == 4
    assert {found[name] for name in experts} == {3}
    assert len({found[name] for name in found.keys() - set(experts)}) > 1
    batch = family.batch(model)
    torch.testing.assert_close(model.eval()(**batch).logits, family.make().eval()(**batch).logits)
    model(**batch).loss.backward()
    assert all(layer.lora["default"].B.grad.any() for _, layer in lora_layers(model))


def test_a_compiled_model_keeps_no_hooks():
    model = torch.compile(FAMILY.make(), backend="eager")
    ll.inject(model, ll.LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
    plan = ll.initialise_from_data(model, batches())
    twin = FAMILY.make()
    ll.inject(twin, ll.LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
    assert [(t.name, t.r) for t in plan.targets] == [
        (t.name, t.r) for t in ll.initialise_from_data(twin, batches()).targets
    ]
    part = batches(1)[0]
    for each in (model, twin):
        with torch.no_grad():
            for _, layer in lora_layers(each):
                layer.lora["default"].B.fill_(0.1)
    torch.testing.assert_close(model(**part).logits, twin(**part).logits)


def test_a_dry_run_looks_at_one_batch():
    module = Counting()
    lora = ll.LoRA(r=3, init_lora_weights="eva", target_modules=["q", "o"], modules_to_save=None)
    trainer(lora, fast_dev_run=True).fit(module, data())
    assert module.modes == [False, False, True]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_options_are_checked():
    with pytest.raises(ll.ConfigError, match=r"5 problems:\n.*rho.*0.5\n.*tau.*\n.*batches.*0\n.*whiten.*\n.*step"):
        EVA(rho=0.5, tau=2, batches=0, whiten="no", step="a b")


def test_without_data_it_says_what_to_do():
    model = build()
    ll.inject(model, ll.LoRAConfig(init_lora_weights="eva", modules_to_save=None))
    with pytest.raises(ll.DeadAdapterError, match=r"'eva' and rank_pattern='auto' from ll.initialise_from_data"):
        model(torch.randn(2, 16))
    with pytest.raises(ll.ConfigError, match="there is no batch"):
        ll.initialise_from_data(model, [])
    with pytest.raises(ll.TargetError, match="reach none of the linear layers"):
        ll.initialise_from_data(model, [1], forward=lambda model, batch: None)
    with pytest.raises(ll.ConfigError, match="no adapter 'korean'"):
        ll.initialise_from_data(model, [torch.randn(2, 16)], "korean")
    other = build()
    ll.inject(other, ll.LoRAConfig(modules_to_save=None))
    with pytest.raises(ll.ConfigError, match="takes nothing from data"):
        ll.initialise_from_data(other, [torch.randn(2, 16)])
    ll.initialise_from_data(model, [torch.randn(20, 16)])
    model.blocks[0].q.lora["default"].B.data += 1
    with pytest.raises(ll.ConfigError, match="is trained already"):
        ll.initialise_from_data(model, [torch.randn(20, 16)])
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="call ll.unmerge first"):
        ll.initialise_from_data(model, [torch.randn(20, 16)])


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def look(self, batch):
        return self.net(batch[0])


def test_manual_optimization_names_a_method_that_only_computes():
    with pytest.raises(ll.UnsupportedError, match=r"manual optimization.*EVA\(step=...\)"):
        trainer(ll.LoRA(init_lora_weights="eva", modules_to_save=None)).fit(Manual(), data())
    with pytest.raises(ll.ConfigError, match=r"EVA\(step='lok'\): Manual has no such method"):
        trainer(ll.LoRA(init_lora_weights=EVA(step="lok"), modules_to_save=None)).fit(Manual(), data())
    module = Manual()
    module.optimizers_ = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)
    trainer(ll.LoRA(r=2, init_lora_weights=EVA(step="look"), modules_to_save=None)).fit(module, data())
    assert all(layer.lora["default"].B.any() for _, layer in lora_layers(module))


def test_a_stream_that_can_be_read_once_is_refused():
    with pytest.raises(ll.ConfigError, match="is a generator, which can be run through only once"):
        trainer(ll.LoRA(init_lora_weights="eva", modules_to_save=None), max_steps=2).fit(Lit(), (b for b in data()))


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_averages_of_another_shape_are_refused():
    lora = ll.LoRA(init_lora_weights="eva", modules_to_save=None)
    with pytest.raises(ll.UnsupportedError, match=r"EMAWeightAveraging copies .*EVA\(rho=1\)"):
        trainer(lora, EMAWeightAveraging()).fit(Lit(), data())
    module = Lit()
    lora = ll.LoRA(r=2, init_lora_weights=EVA(rho=1), modules_to_save=None)
    trainer(lora, EMAWeightAveraging()).fit(module, data())
    assert all(layer.lora["default"].B.any() for _, layer in lora_layers(module))


class Two(Lit):
    """With two dataloaders, and a name of its own for the index."""

    def training_step(self, batch, i):
        return super().training_step(batch["a"], i) + super().training_step(batch["b"], i)


@pytest.mark.parametrize("kind", ["mapping", "combined", "workers", "datamodule", "pytorch_lightning"])
def test_dataloaders_of_every_form(kind):
    lora, package = ll.LoRA(r=4, init_lora_weights="eva", modules_to_save=None), pl
    module, loaders = Two(), {"a": data(), "b": data(shuffle=True)}
    if kind == "combined":
        loaders = CombinedLoader(loaders, "min_size")
    elif kind == "workers":
        module = Lit()
        loaders = DataLoader(data().dataset, batch_size=8, num_workers=1, persistent_workers=True)
    elif kind == "datamodule":
        module, loaders = Lit(), pl.LightningDataModule()
        loaders.train_dataloader = data
    elif kind == "pytorch_lightning":
        package, module, loaders = pytorch_lightning, Other(), data()
    run = package.Trainer(
        accelerator="cpu",
        callbacks=[lora],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, loaders)
    assert run.global_step == 2 * 4
    assert len(set(ranks(module).values())) > 1


class Other(Steps, pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.optimizers_ = build(), lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2)


def test_a_step_that_fails_says_who_called_it():
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no luck")

    module = Failing()
    with pytest.raises(RuntimeError, match="no luck") as error:
        trainer(ll.LoRA(init_lora_weights="eva", modules_to_save=None)).fit(module, data())
    assert any("called by LoRA before training" in note for note in error.value.__notes__)
    assert not ll.adapters(module)
    assert "log" not in vars(module)
    assert module.net.training


def test_strategies_that_split_layers_start_from_a_folder(tmp_path):
    """They refuse, and what the message says to do works."""
    single = Lit()
    ll.inject(single, ll.LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
    plan = ll.initialise_from_data(single, [torch.randn(64, 16)], forward=lambda module, x: module.net(x))
    ll.save_adapter(single, tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    patterns = {key: written[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    split = {"strategy": ModelParallelStrategy(1, 1), "devices": 1}
    try:
        with pytest.raises(ll.UnsupportedError, match=r"ModelParallelStrategy splits them. On one device .* init_from"):
            trainer(ll.LoRA(init_lora_weights="eva", modules_to_save=None), **split).fit(Lit("configure_model"), data())
        module = Lit("configure_model")
        lora = ll.LoRA(init_from=tmp_path / "peft", modules_to_save=None, **patterns)
        trainer(lora, strategy=ModelParallelStrategy(1, 1), devices=1).fit(module, data())
    finally:
        distributed.destroy_process_group()
    assert ranks(module) == {t.name: t.r for t in plan.targets}
    for (_, a), (_, b) in zip(lora_layers(module), lora_layers(single), strict=True):
        assert a.lora["default"].scaling == pytest.approx(b.lora["default"].scaling)
        assert overlap(torch.linalg.qr(a.lora["default"].A.detach().T).Q.T, b.lora["default"].A.detach()) > 0.9


def test_what_was_done_by_hand_is_not_done_again(monkeypatch):
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)
    module = Lit()
    ll.inject(module, ll.LoRAConfig(r=4, init_lora_weights="eva", modules_to_save=None))
    plan = ll.initialise_from_data(module, [torch.randn(64, 16)], forward=lambda module, x: module.net(x))
    trainer(ll.LoRA(r=4, init_lora_weights="eva", modules_to_save=None)).fit(module, data())
    assert ranks(module) == {t.name: t.r for t in plan.targets}
    assert all(layer.lora["default"].B.any() for _, layer in lora_layers(module))


class TestBatchesThatDiffer:
    """Which layers are called, and with what, is asked of each batch."""

    @staticmethod
    def parts(n: int = 6) -> list[torch.Tensor]:
        scales = 2.0 ** -torch.arange(16)
        return [torch.randn(32, 16) * (scales.flip(0) if i % 2 else scales) for i in range(n)]

    @staticmethod
    def start(net: nn.ModuleDict, parts: list, forward) -> None:
        ll.inject(net, ll.LoRAConfig(r=4, init_lora_weights=EVA(rho=1, tau=1.0), modules_to_save=None))
        ll.initialise_from_data(net, parts, forward=forward)

    @staticmethod
    def assert_components(layer, rows: list[torch.Tensor]) -> None:
        X = torch.cat(rows).double()
        V = torch.linalg.svd(X - X.mean(0))[2][:4]
        overlap = torch.linalg.svdvals(layer.lora["default"].A.detach().double() @ V.T)
        torch.testing.assert_close(overlap, torch.ones(4, dtype=torch.double), rtol=0, atol=1e-4)

    def test_each_batch_is_of_one_layer(self):
        net = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)})
        parts = [("ab"[i % 2], x) for i, x in enumerate(self.parts())]
        self.start(net, parts, lambda net, part: net[part[0]](part[1]))
        for name in "ab":
            self.assert_components(net[name], [x for own, x in parts if own == name])

    def test_the_first_batch_reaches_none(self):
        net = nn.ModuleDict({"a": nn.Linear(16, 8)})
        parts = self.parts()
        self.start(net, parts, lambda net, x: x if x is parts[0] else net["a"](x))
        self.assert_components(net["a"], parts[1:])

    def test_layers_that_share_an_input_at_first(self):
        net = nn.ModuleDict({name: nn.Linear(16, 8) for name in "abcd"})
        parts = self.parts()

        def forward(net, x):
            y = x if x is parts[0] or x is parts[1] else x.flip(1)
            net["a"](x), net["c"](x), net["b"](y)
            return net["d"](y) if x is not parts[3] else x

        self.start(net, parts, forward)
        others = [parts[0], parts[1], *(x.flip(1) for x in parts[2:])]
        for name in "ac":
            self.assert_components(net[name], parts)
        self.assert_components(net["b"], others)
        self.assert_components(net["d"], [*others[:3], *others[4:]])

    @pytest.mark.parametrize("x", [torch.randn(1, 16), torch.ones(8, 16)], ids=["one row", "all the same"])
    def test_inputs_that_do_not_vary(self, x):
        net = nn.ModuleDict({"a": nn.Linear(16, 8)})
        with pytest.raises(ll.TargetError, match="what the batches give the layers does not vary"):
            self.start(net, [x], lambda net, x: net["a"](x))
        assert ll.adapters(net), "nothing was taken off"

    @pytest.mark.parametrize("options", [{"init_lora_weights": "eva"}, {"rank_pattern": "auto"}], ids=str)
    @pytest.mark.parametrize("odd", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, options, odd):
        net = build()
        ll.inject(net, ll.LoRAConfig(r=4, modules_to_save=None, **options))
        bad = torch.randn(8, 16)
        bad[0, 0] = odd
        with pytest.raises(ll.ConfigError, match=r"initialise_from_data: .*blocks.\d.\w.* not finite"):
            ll.initialise_from_data(net, [torch.randn(8, 16), bad], forward=lambda net, x: net(x).square().mean())
