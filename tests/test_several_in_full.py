"""Several adapters that train modules in full, each in its own way: through checkpoints, folders, and as one."""

import functools
import pickle

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
from lightning_lora.injection.copies import bring
from lightning_lora.marks import COPIES
from tests.commands.files import run
from tests.helpers.layers import randomise
from tests.helpers.modules import trainer
from tests.helpers.toy import WIDTH, Lit, build, data

HEAD, NO_HEAD = {"modules_to_save": ["head"]}, {"modules_to_save": None}
BIAS = {"modules_to_save": None, "bias": "lora_only"}
lora = functools.partial(ll.LoRA, r=2, lora_alpha=8, target_modules=["q"])


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """An adapter with a head, another one with a head, and one with biases; none of them has those of the base."""
    for seed, (name, options) in enumerate({"a": HEAD, "b": HEAD, "biases": BIAS}.items()):
        module = Lit()
        ll.inject(module, ll.LoRAConfig(r=2, lora_alpha=8, target_modules=["q"], **options), name)
        randomise(module, seed)
        ll.save_adapter(module, tmp_path / name, name)
    return {name: str(tmp_path / name) for name in ("a", "b", "biases")}


def outputs(module: nn.Module, name: str, x: Tensor) -> Tensor:
    ll.set_adapter(module, name)
    return module.eval().net(x).detach()


def fit(module: Lit, *callbacks: ll.LoRA, path, **options) -> str:
    run = trainer(*callbacks, enable_checkpointing=True, default_root_dir=path, **options)
    run.fit(module, data())
    return run.checkpoint_callback.best_model_path


def loaded(source: str, name: str) -> Lit:
    module = Lit()
    ll.load_adapter(module, source, name)
    return module


def exported(source: str, name: str, tmp_path) -> Lit:
    export_checkpoint(source, tmp_path / f"{name}.peft", name)
    return loaded(str(tmp_path / f"{name}.peft"), name)


# What is loaded from folders, what the run trains beside it, and which of all are active.
RUNS = {
    "both have a head": (["a", "b"], ("b", HEAD), ["b"]),
    "the other one has none": (["a"], ("new", NO_HEAD), ["new"]),
    "the head stays in place": (["a"], ("new", NO_HEAD), ["a", "new"]),
    "biases": (["biases"], ("new", NO_HEAD), ["new"]),
    "biases and a head": (["biases", "a"], ("a", HEAD), ["a"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_has_its_own_from_a_checkpoint(name, folders, x, tmp_path):
    before, (trained, options), active = RUNS[name]

    def setup() -> Lit:
        module = Lit()
        for each in before:
            ll.load_adapter(module, folders[each])
        if trained not in before:
            ll.inject(module, ll.LoRAConfig(r=2, lora_alpha=8, target_modules=["q"], **options), trained)
        ll.set_adapter(module, active)
        return module

    module = setup()
    path = fit(module, lora(adapter_name=trained, **options), path=tmp_path)
    whole = module.eval().net(x).detach()
    wanted = {each: outputs(module, each, x) for each in {*before, trained}}
    again = ll.load_from_checkpoint(Lit, path)
    assert torch.equal(again.eval().net(x), whole)
    for each, expected in wanted.items():
        assert torch.equal(outputs(again, each, x), expected)
        assert torch.equal(outputs(loaded(path, each), each, x), expected)
        assert torch.equal(outputs(exported(path, each, tmp_path), each, x), expected)
        peft = PeftModel.from_pretrained(Lit(), tmp_path / f"{each}.peft").base_model.model
        torch.testing.assert_close(peft.eval().net(x), expected)
    with ll.disable_adapters(again):
        assert torch.equal(again.net(x), build().eval()(x)), "the base's own head is known"
    trainer(lora(adapter_name=trained, **options), max_epochs=2).fit(resumed := setup(), data(), ckpt_path=path)
    for each in before:
        if each != trained:
            assert torch.equal(outputs(resumed, each, x), wanted[each])


def test_a_run_that_began_with_others_active_resumes(folders, x, tmp_path):
    """They are made active before values are loaded: which values are in place goes by it."""
    module = Lit()
    ll.load_adapter(module, folders["a"])
    ll.inject(module, ll.LoRAConfig(r=2, lora_alpha=8, target_modules=["q"], **NO_HEAD), "new")
    ll.set_adapter(module, "new")
    path = fit(module, lora(adapter_name="new", **NO_HEAD), path=tmp_path)
    again = Lit()
    ll.load_adapter(again, folders["a"])
    trainer(lora(adapter_name="new", **NO_HEAD)).fit(again, data(), ckpt_path=path)
    assert torch.equal(outputs(again, "new", x), outputs(module, "new", x))
    assert torch.equal(outputs(again, "a", x), outputs(module, "a", x))


def test_a_models_own_choice_stays_with_the_values_of_the_file(folders, x, tmp_path):
    """As for validate, test and predict with a model that has all adapters before."""

    def setup(active: str) -> Lit:
        module = Lit()
        ll.load_adapter(module, folders["a"])
        ll.inject(module, ll.LoRAConfig(r=2, lora_alpha=8, target_modules=["q"], **NO_HEAD), "new")
        ll.set_adapter(module, active)
        return module

    callback = functools.partial(lora, adapter_name="new", **NO_HEAD)
    path = fit(module := setup("new"), callback(), path=tmp_path)
    again = setup("a")
    trainer(callback()).predict(again, data(), ckpt_path=path)
    assert again.net.blocks[0].q.lora_active == ("a",)
    assert torch.equal(again.eval().net(x), outputs(module, "a", x))
    assert torch.equal(outputs(again, "new", x), outputs(module, "new", x))
    none = setup("a")
    ll.inject(none, ll.LoRAConfig(r=2, target_modules=["q"], **NO_HEAD), "third")
    ll.set_adapter(none, "third")
    ll.delete_adapter(none, "third")
    assert not none.net.blocks[0].q.lora_active
    trainer(callback()).predict(none, data(), ckpt_path=path)
    assert none.net.blocks[0].q.lora_active == ("new",), "where none was active there is no choice to keep"


def test_one_that_was_made_of_others(folders, x, tmp_path):
    module = Lit()
    ll.load_adapter(module, folders["a"])
    ll.inject(module, ll.LoRAConfig(r=2, target_modules=["o"], **NO_HEAD), "new")
    randomise(module, 9)
    ll.combine_adapters(module, {"a": 0.7, "new": 0.3}, "both")
    ll.set_adapter(module, "both")
    path = fit(module, ll.LoRA(adapter_name="both", **ll.adapters(module)["both"].to_dict()), path=tmp_path)
    wanted = {name: outputs(module, name, x) for name in ("both", "a", "new")}
    again = ll.load_from_checkpoint(Lit, path)
    assert all(torch.equal(outputs(again, name, x), expected) for name, expected in wanted.items())


def test_a_folder_says_what_others_trained(folders, tmp_path, capsys):
    module = Lit()
    ll.load_adapter(module, folders["a"])
    path = fit(module, lora(adapter_name="new", **NO_HEAD), path=tmp_path)
    exported(path, "new", tmp_path)
    said = "without it: net.head.bias, net.head.weight"
    assert said in (tmp_path / "new.peft" / "README.md").read_text()
    run("export", path, tmp_path / "by-command", "--adapter", "new")
    assert "other adapters trained net.head.bias, net.head.weight in full" in capsys.readouterr().out
    run("export", path, tmp_path / "other", "--adapter", "a")
    assert "other adapters" not in capsys.readouterr().out
    other = Lit()
    with torch.no_grad():
        other.net.blocks[0].o.weight.mul_(2)
    with pytest.raises(ll.BaseMismatchError, match="net.blocks.0.o.weight"):
        ll.load_adapter(other, tmp_path / "new.peft")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_layers_that_another_adapter_is_on(bias, x, tmp_path):
    model = build().eval()
    for name, options in {"one": {"target_modules": ["q"], "bias": bias}, "two": {"target_modules": ["o"]}}.items():
        ll.inject(model, ll.LoRAConfig(r=2, **NO_HEAD, **options), name)
        ll.set_adapter(model, name)
        randomise(model, 4)
    ll.combine_adapters(model, {"one": 0.7, "two": 0.3}, "both")
    ll.set_adapter(model, "both")
    expected = model(x)
    ll.save_adapter(model, tmp_path / "both", "both")
    again = build().eval()
    ll.load_adapter(again, tmp_path / "both")
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(PeftModel.from_pretrained(build(), tmp_path / "both").eval()(x), expected)


def test_nothing_active_is_nothing_to_merge():
    model = build()
    for name in ("one", "two"):
        ll.inject(model, ll.LoRAConfig(r=2, **NO_HEAD), name)
    ll.combine_adapters(model, {"one": 0.7, "two": 0.3}, "both")
    for name in ("one", "two"):
        ll.delete_adapter(model, name)
    before = pickle.dumps(model.state_dict())
    for merge in (ll.merge, ll.merge_and_unload):
        with pytest.raises(
            ll.ConfigError, match=r"no adapter is active. Known: \['both'\]: ll.set_adapter makes one so"
        ):
            merge(model)
    assert pickle.dumps(model.state_dict()) == before
    assert ll.merge(model, "both").layers


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
@pytest.mark.parametrize("weight", [1e38, 1e300])
def test_weights_beyond_measure(method, weight):
    model = build()
    for name in ("one", "two"):
        ll.inject(model, ll.LoRAConfig(r=2, **NO_HEAD), name)
    randomise(model)
    with pytest.raises(ll.ConfigError, match="blocks.0.q: the sum is too large to be taken: give smaller weights"):
        ll.combine_adapters(model, {"one": weight, "two": weight}, "both", method, 2 if method == "svd" else None)
    assert [*ll.adapters(model)] == ["one", "two"]


class TestTheSameInOtherWords:
    """An adapter from a file has a configuration of its own words, and a callback may ask for the same in others."""

    def test_goes_on(self, x, tmp_path):
        module = Lit()
        fit(module, ll.LoRA(r=2, lora_alpha=8), path=tmp_path)
        ll.save_adapter(module, tmp_path / "folder")
        again = Lit()
        ll.load_adapter(again, tmp_path / "folder")
        assert torch.equal(outputs(again, "default", x), outputs(module, "default", x))
        trainer(ll.LoRA(r=2, lora_alpha=8)).fit(again, data())
        assert not torch.equal(outputs(again, "default", x), outputs(module, "default", x))

    def test_all_of_a_module_is_not_a_part_of_it(self, tmp_path):
        """What came on top would be trained, and in no configuration."""
        saved = ll.LoRAConfig(r=2, target_modules=["blocks.1.q"], modules_to_save=["blocks.0.norm"])
        model = build()
        ll.inject(model, saved)
        ll.save_adapter(model, tmp_path / "folder")
        again = build()
        ll.load_adapter(again, tmp_path / "folder")
        with pytest.raises(ll.ConfigError, match="modules_to_save"):
            ll.inject(again, ll.LoRAConfig(r=2, target_modules=["blocks.1.q"], modules_to_save=["blocks.0"]))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"r": 4}, "r: 2 -> 4"),
            ({"target_modules": ["q"]}, "target_modules: .* -> .'q'."),
            ({"modules_to_save": None}, "modules_to_save: .'head'. -> None"),
            ({"lora_dropout": 0.1}, "lora_dropout: 0.0 -> 0.1"),
        ],
    )
    def test_something_else_is_refused(self, options, said, tmp_path):
        model = build()
        ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=8))
        ll.save_adapter(model, tmp_path / "folder")
        again = build()
        ll.load_adapter(again, tmp_path / "folder")
        with pytest.raises(ll.ConfigError, match=f"another configuration: .*{said}.*init_from=... goes on from a file"):
            ll.inject(again, ll.LoRAConfig(**{"r": 2, "lora_alpha": 8, **options}))


@pytest.mark.filterwarnings("ignore:.*is trained in full with adapter 'a', and stays as it is")
def test_the_way_to_a_second_head(folders, x, tmp_path):
    """Errors about one that another adapter has say what gives each its own."""
    module = loaded(folders["a"], "a")
    with pytest.raises(ll.CheckpointError, match="since adapter 'a' has it: before the run call ll.load_adapter.*'b'"):
        fit(module, lora(adapter_name="b", init_from=folders["b"]), path=tmp_path)
    module = loaded(folders["a"], "a")
    ll.load_adapter(module, folders["b"], "b")
    with pytest.raises(ll.ConfigError, match=r"with adapter 'a': call ll.set_adapter\(model, 'b'\), which has its own"):
        fit(module, lora(adapter_name="b", **HEAD), path=tmp_path)
    module = loaded(folders["a"], "a")
    ll.load_adapter(module, folders["b"], "b")
    ll.set_adapter(module, "b")
    path = fit(module, lora(adapter_name="b", **HEAD), path=tmp_path)
    callbacks = [lora(adapter_name="a", modules_to_save="auto"), lora(adapter_name="b", modules_to_save="auto")]
    for each in (callbacks, callbacks[::-1]):
        with pytest.raises(ll.CheckpointError, match="each of them has its own in the file, so let ll.load_from_check"):
            trainer(*each).validate(Lit(), data(), ckpt_path=path, verbose=False)
    again = ll.load_from_checkpoint(Lit, path)
    for name in "ab":
        assert torch.equal(outputs(again, name, x), outputs(module, name, x))


def test_values_go_with_their_adapter():
    """Also those for a module that its configuration does not train, as they come with a file."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["a"], modules_to_save=["head"]), "x")
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["a"], modules_to_save=None), "y")
    bring(model["head"], "y", {"weight": torch.ones(2, 4)}, whole=False)
    ll.delete_adapter(model, "y")
    assert "y" not in vars(model["head"]).get(COPIES, {})


def test_the_base_of_one_has_the_head_from_before_another_trained_it(tmp_path):
    model = build()
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["head"]), "trains")
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), "leaves")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 1
    ll.save_adapter(model, tmp_path / "leaves", "leaves")
    fresh = build()
    ll.load_adapter(fresh, tmp_path / "leaves")
    assert list(ll.adapters(fresh)) == ["leaves"]
