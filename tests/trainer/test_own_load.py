"""``MyModule.load_from_checkpoint(path)``, as everybody calls it, with the file of a LoRA run."""

import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_lora as ll
from lightning_lora.comparators import BitFit
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, Steps, adamw_with_schedule, build, data

X = next(iter(data()))[0]


class Other(Steps, pytorch_lightning.LightningModule):
    """One of the other package."""

    optimizers_ = staticmethod(adamw_with_schedule)

    def __init__(self) -> None:
        super().__init__()
        self.net = build()


class Configured(Steps, pl.LightningModule):
    """Whose hyperparameters are one argument."""

    optimizers_ = staticmethod(adamw_with_schedule)

    def __init__(self, conf: dict) -> None:
        super().__init__()
        self.save_hyperparameters(conf)
        self.net = build(conf["seed"])


class Nested(Steps, pl.LightningModule):
    """Which takes an object."""

    optimizers_ = staticmethod(adamw_with_schedule)

    def __init__(self, activation: nn.Module, seed: int = 1, **kwargs: object) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.activation, self.net = activation, build(seed)


class Numbers(pl.LightningDataModule):
    """Data with a hyperparameter, and a state."""

    seen = 0

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return data(n=self.hparams.size)

    def state_dict(self):
        return {"seen": 5}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def run(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: object) -> str:
    """The path of what a run has written."""
    settings = {"max_epochs": 1, "enable_checkpointing": True, "default_root_dir": folder, **options}
    fitted = trainer(*callbacks, **settings)
    fitted.fit(module, data())
    return fitted.checkpoint_callback.best_model_path


def assert_same(loaded: nn.Module, module: nn.Module) -> None:
    own, wanted = ll.adapter_state_dict(loaded), ll.adapter_state_dict(module)
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], value) for key, value in wanted.items())
    assert torch.equal(loaded.eval().net(X), module.eval().net(X))
    assert not torch.equal(loaded.net(X), build().eval()(X))


CALLBACKS = {
    "lora": lambda: ll.LoRA(r=2, lora_alpha=8),
    "dora": lambda: ll.LoRA(r=2, lora_alpha=8, use_dora=True, bias="all"),
    "pissa": lambda: ll.LoRA(r=2, lora_alpha=8, init_lora_weights="pissa"),
    "bfloat16": lambda: ll.LoRA(r=2, lora_alpha=8, adapter_dtype="bfloat16"),
    "bitfit": lambda: BitFit(),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("strict", [None, True, False])
def test_it_has_its_adapters(tmp_path, kind, strict):
    module = Lit("configure_model")
    path = run(tmp_path, module, CALLBACKS[kind]())
    loaded = Lit.load_from_checkpoint(path, strict=strict)
    assert loaded.built == "configure_model"
    assert "on_load_checkpoint" not in vars(loaded)
    assert_same(loaded, module)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in module.named_parameters() if p.requires_grad}


def test_of_the_other_package(tmp_path):
    module = Other()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fitted = pytorch_lightning.Trainer(
        max_epochs=1, callbacks=[ll.LoRA(r=2, lora_alpha=8)], default_root_dir=tmp_path, **options
    )
    fitted.fit(module, data())
    assert_same(Other.load_from_checkpoint(fitted.checkpoint_callback.best_model_path), module)


@pytest.mark.filterwarnings("ignore:Attribute .activation. is an instance")
def test_of_a_command_line(tmp_path, monkeypatch):
    """Whose files have classes by name, and name who makes them."""
    monkeypatch.setattr(sys, "argv", ["program"])  # LightningCLI looks there beside its own arguments
    activation = {"class_path": "torch.nn.LeakyReLU", "init_args": {"negative_slope": 0.3}}
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [{"class_path": "lightning_lora.LoRA", "init_args": {"r": 2, "lora_alpha": 8}}]
    args = {"seed_everything": 0, "model": {"activation": activation}, "trainer": {**options, "callbacks": callbacks}}
    cli = LightningCLI(Nested, run=False, args=args, save_config_callback=None)
    cli.trainer.fit(cli.model, data())
    path = cli.trainer.checkpoint_callback.best_model_path
    for loaded in (Nested.load_from_checkpoint(path), ll.load_from_checkpoint(Nested, path)):
        assert loaded.activation.negative_slope == 0.3
        assert_same(loaded, cli.model)
    again = trainer(ll.LoRA(r=2, lora_alpha=8), max_epochs=2)
    again.fit(loaded, data(), ckpt_path=path)
    assert again.global_step == 8


def test_the_hyperparameters_stay_what_they_are(tmp_path):
    path = run(tmp_path, Lit(), ll.LoRA(r=2, lora_alpha=8), max_epochs=1)
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved == {"built": "init", "seed": 1}
    assert Lit(**saved).hparams == saved
    assert Lit.load_from_checkpoint(path).hparams == saved


@pytest.mark.filterwarnings("ignore:Attribute .activation. is an instance")
def test_arguments_that_have_no_names(tmp_path):
    """Lightning calls hyperparameters ``kwargs`` where they have no name of their own."""
    module = Nested(nn.Tanh(), slope=0.3)
    path = run(tmp_path, module, ll.LoRA(r=2, lora_alpha=8))
    assert torch.load(path, weights_only=False)["hparams_name"] == "kwargs"
    loaded = Nested.load_from_checkpoint(path, weights_only=False)
    assert_same(loaded, module)
    assert loaded.hparams.slope == 0.3


def test_where_one_argument_has_all_hyperparameters(tmp_path):
    """Lightning gives the class all that the file says; so this doesn't say who makes the module."""
    module = Configured({"seed": 1})
    path = run(tmp_path, module, ll.LoRA(r=2, lora_alpha=8))
    loaded = ll.load_from_checkpoint(Configured, path)
    assert_same(loaded, module)
    assert loaded.hparams == {"seed": 1}
    with pytest.raises(RuntimeError, match="Unexpected key.*lora.default.A"):
        Configured.load_from_checkpoint(path)


def test_data_modules_are_as_ever(tmp_path):
    fitted = trainer(ll.LoRA(r=2, lora_alpha=8), enable_checkpointing=True, default_root_dir=tmp_path)
    fitted.fit(Lit(), datamodule=Numbers(size=16))
    again = Numbers.load_from_checkpoint(fitted.checkpoint_callback.best_model_path)
    assert (again.hparams.size, again.seen) == (16, 5)


@pytest.mark.parametrize("strict", [True, False])
def test_another_base_is_an_error(tmp_path, strict):
    path = run(tmp_path, Lit(), ll.LoRA(r=2, lora_alpha=8))
    with pytest.raises(ll.BaseMismatchError, match="another base model"):
        Lit.load_from_checkpoint(path, seed=2, strict=strict)
    with pytest.raises(ll.CheckpointError, match="don't fit what __init__ and configure_model of Lit build"):
        Lit.load_from_checkpoint(path, built="setup", strict=strict)


def test_files_of_older_versions(tmp_path):
    """They do not say who makes the module."""
    module = Lit()
    path = run(tmp_path, module, ll.LoRA(r=2, lora_alpha=8))
    saved = torch.load(path, weights_only=True)
    del saved["module_arguments"]
    torch.save(saved, path)
    assert_same(ll.load_from_checkpoint(Lit, path), module)


SCRIPT = """
    import warnings
    warnings.filterwarnings("ignore")
    {imports}
    from tests.helpers.toy import Lit
    try:
        loaded = Lit.load_from_checkpoint({path!r}, strict={strict})
    except ValueError as error:
        print(error)
    else:
        print(sum(".lora." in name for name, _ in loaded.named_parameters()))
"""


@pytest.mark.parametrize(
    ("imports", "strict", "said"),
    [
        ("", False, "lightning_lora.loading.instantiate.with_adapters' from the checkpoint is not in the allowlist"),
        ("import lightning, lightning_lora", True, "8"),
        ("from lightning_lora import LoRA", False, "8"),
    ],
)
def test_in_a_process_of_its_own(tmp_path, imports, strict, said):
    """Where this package was not imported Lightning refuses to make the module: the bare base comes from no file."""
    path = run(tmp_path, Lit(), ll.LoRA(r=2, lora_alpha=8))
    script = textwrap.dedent(SCRIPT).format(imports=imports, path=path, strict=strict)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert said in done.stdout, done.stderr


def test_a_class_that_loads_in_its_own_way_gives_no_model_without_adapters(tmp_path):
    class Own(Lit):
        @classmethod
        def load_from_checkpoint(cls, path, **options):
            return cls()

    path = run(tmp_path, Own(), ll.LoRA(r=2, lora_alpha=8))
    with pytest.raises(
        ll.CheckpointError, match="did not put the adapters of .* on: make the module, and call ll.load_"
    ):
        ll.load_from_checkpoint(Own, path)


def test_an_argument_that_is_a_mapping_stays_as_it_is(tmp_path):
    class Taught(Lit):
        def __init__(self, options: dict, seed: int = 1) -> None:
            super().__init__(seed=seed)
            self.save_hyperparameters("options")
            self.options = options

    options = {"_instantiator": "of.somebody.else", "temperature": 2.0}
    for given in (options, {"temperature": 2.0}):
        path = run(tmp_path, module := Taught(dict(given)), ll.LoRA(r=2, lora_alpha=8))
        loaded = Taught.load_from_checkpoint(path)
        assert loaded.options == given
        assert_same(loaded, module)


def test_who_else_makes_a_module_stays_named(tmp_path):
    """A function of the user's own, which a file names, is not exchanged for ours."""
    module = Lit()
    module.save_hyperparameters({"_instantiator": "of.somebody.else"})
    path = run(tmp_path, module, ll.LoRA(r=2, lora_alpha=8))
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["_instantiator"] == "of.somebody.else"
