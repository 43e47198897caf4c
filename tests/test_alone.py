"""What `adapter_state_dict` gives loads strictly, and nothing less does."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.comparators.bitfit import BitFitConfig
from lightning_lora.comparators.bottleneck import BottleneckConfig
from lightning_lora.comparators.prefix import PrefixTuningConfig
from lightning_lora.methods.active import active_adapters
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, build, data

CONFIGS = {
    "lora": ll.LoRAConfig(r=2, lora_alpha=8),
    "dora": ll.LoRAConfig(r=2, lora_alpha=8, use_dora=True, modules_to_save=["head"]),
    "pissa": ll.LoRAConfig(r=2, lora_alpha=8, init_lora_weights="pissa"),
    "bitfit": BitFitConfig(),
}


@pytest.fixture(params=CONFIGS)
def pair(request) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with fresh adapters, and the state of trained ones."""
    model, trained = build(), build()
    for each in (model, trained):
        ll.inject(each, CONFIGS[request.param])
    randomise(trained)
    return model, ll.adapter_state_dict(trained)


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    own, base = ll.adapter_state_dict(model), build().state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if k in base and k not in state)


def test_alone(pair):
    model, state = pair
    assert not any(model.load_state_dict(state))
    assert_loaded(model, state)


@pytest.mark.parametrize("config", [BottleneckConfig(bottleneck_size=4), PrefixTuningConfig(num_virtual_tokens=2)])
def test_modules_that_came_on_top(config):
    model = FAMILIES["llama"].make()
    ll.inject(model, config)
    state = {key: value + 1 for key, value in ll.adapter_state_dict(model).items()}
    model.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in ll.adapter_state_dict(model).items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_into_a_copy(pair, copied):
    model, state = pair
    copied(model).load_state_dict(state)
    again = copied(model)
    again.load_state_dict(state)
    assert_loaded(again, state)


def test_in_another_module(pair):
    """Whose own parameters are missed as ever."""
    model, state = pair
    outer = nn.ModuleDict({"other": nn.Linear(2, 2), "net": model})
    inside = {f"net.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match='Missing key.*: "other.weight", "other.bias"[.]'):
        outer.load_state_dict(inside)
    outer.load_state_dict({**inside, **nn.ModuleDict({"other": outer["other"]}).state_dict()})
    assert_loaded(model, state)


def test_less_is_an_error(pair):
    model, state = pair
    prefix = next(iter(state)).rpartition(".")[0]  # all that the first module has
    left = [key for key in state if not key.startswith(prefix)]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict({key: state[key] for key in left})
    said = str(caught.value)
    assert all((f'"{key}"' in said) == (key not in left) for key in state)
    assert '"blocks.0.norm.weight"' not in said
    assert model.load_state_dict({}, strict=False).missing_keys


def test_others_are_an_error(pair):
    model, state = pair
    with pytest.raises(RuntimeError, match='Unexpected key.*"blocks.7.o.weight"'):
        model.load_state_dict({**state, "blocks.7.o.weight": torch.zeros(2)})
    with pytest.raises(RuntimeError, match='Missing key.*"blocks.1.o.weight"'):  # a base that is not whole
        model.load_state_dict({**state, "blocks.0.o.weight": build().blocks[0].o.weight})


def test_the_base_alone_and_all_of_it_load_as_before(pair):
    model, state = pair
    model.load_state_dict({**model.state_dict(), **state})
    assert_loaded(model, state)


def test_a_loading_that_broke_off_changes_no_other(monkeypatch):
    model = build()
    ll.inject(model, CONFIGS["lora"])
    state = ll.adapter_state_dict(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.LayerNorm, "_load_from_state_dict", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.load_state_dict(state)
    whole = model.state_dict()
    del whole["head.bias"]
    with pytest.raises(RuntimeError, match='Missing key.*"head.bias"'):
        model.load_state_dict(whole)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_loaded_into_merged_layers(strict):
    """It would not show in what the model computes."""
    model, other = build(), build()
    for seed, each in enumerate((model, other)):
        ll.inject(each, CONFIGS["lora"])
        randomise(each, seed)
    ll.merge(model)
    before = copy.deepcopy(ll.adapter_state_dict(model))
    with pytest.raises(RuntimeError, match="adapters are merged into .*: call ll.unmerge before others are loaded"):
        model.load_state_dict(ll.adapter_state_dict(other), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in ll.adapter_state_dict(model).items())
    ll.unmerge(model)
    model.load_state_dict(ll.adapter_state_dict(other))
    assert_loaded(model, ll.adapter_state_dict(other))


@pytest.mark.parametrize("pair", ["lora", "dora", "pissa"], indirect=True)  # what a folder of PEFT can have
def test_adapters_that_came_from_a_folder(pair, tmp_path):
    model, state = pair
    ll.save_adapter(model, tmp_path / "folder")
    again = build()
    ll.load_adapter(again, tmp_path / "folder")
    again.load_state_dict(state)
    assert_loaded(again, state)


def test_one_of_several():
    model = build()
    for name in ("one", "two"):
        ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), name)
    randomise(model)
    state = {key: value + 1 for key, value in ll.adapter_state_dict(model, "two").items()}
    before = {key: value.clone() for key, value in ll.adapter_state_dict(model, "one").items()}
    model.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in ll.adapter_state_dict(model, "two").items())
    assert all(torch.equal(v, before[k]) for k, v in ll.adapter_state_dict(model, "one").items())


@pytest.fixture
def with_heads(tmp_path):
    """Makes models with two adapters that train a head each, one's of which is in place."""

    def make(*, place: str, seed: int = 0, new: Callable[[], nn.Module] = build, head: str = "head") -> nn.Module:
        both = new()
        for name in ("one", "two"):
            alone = new()
            ll.inject(alone, ll.LoRAConfig(r=2, lora_alpha=8, modules_to_save=[head]), name)
            randomise(alone, seed := seed + 1)
            alone.get_submodule(head).load_state_dict(
                {k: v + seed for k, v in alone.get_submodule(head).state_dict().items()}
            )
            ll.save_adapter(alone, tmp_path / f"{name}-{seed}", name)
            ll.load_adapter(both, tmp_path / f"{name}-{seed}", name)
        ll.set_adapter(both, place)
        return both

    return make


def of_each(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.clone() for k, v in ll.adapter_state_dict(model, name).items()} for name in ("one", "two")}


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], value) for key, value in tensors.items())


@pytest.mark.parametrize("place", ["one", "two"])
@pytest.mark.parametrize("other", ["one", "two"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_each_gets_its_own_head(with_heads, place, other, inside, whole):
    model, trained = with_heads(place=place), with_heads(place=other, seed=7)
    base = (
        {} if not whole else {**model.state_dict(), "head.weight": trained.head.weight, "head.bias": trained.head.bias}
    )
    state, wanted = {**base, **ll.adapter_state_dict(trained)}, of_each(trained)
    assert not torch.equal(wanted["one"]["head.weight"], wanted["two"]["head.weight"])
    if inside:
        nn.ModuleDict({"net": model}).load_state_dict({f"net.{key}": value for key, value in state.items()})
    else:
        model.load_state_dict(state)
    assert_same(of_each(model), wanted)
    assert active_adapters(model) == [place]


@pytest.mark.parametrize("place", ["one", "two"])
def test_one_of_several_with_its_head(with_heads, place):
    model, trained = with_heads(place=place), with_heads(place="two", seed=7)
    wanted = {"one": of_each(trained)["one"], "two": of_each(model)["two"]}
    model.load_state_dict(ll.adapter_state_dict(trained, "one"))
    assert_same(of_each(model), wanted)


def test_whose_a_head_is_has_to_be_known(with_heads):
    model, trained = with_heads(place="one"), with_heads(place="two", seed=7)
    before, each = of_each(model), of_each(trained)
    with pytest.raises(RuntimeError, match="head.weight may be of 'one' or of 'two'.*ll.load_adapter"):
        model.load_state_dict({**each["one"], **each["two"]})
    assert all(torch.equal(of_each(model)[n][k], before[n][k]) for n in before for k in ("head.weight", "head.bias"))


def test_a_head_that_is_missing_or_too_large(with_heads):
    model, state = with_heads(place="one"), ll.adapter_state_dict(with_heads(place="one", seed=7))
    kept = state["head.lora.two.bias"]
    with pytest.raises(RuntimeError, match=r"head.lora.two.bias: \(1,\) given -> \(\d+,\) in the model"):
        model.load_state_dict({**state, "head.lora.two.bias": kept[:1]})
    del state["head.bias"]
    with pytest.raises(RuntimeError, match='Missing key.*: "head.bias"[.]'):
        model.load_state_dict(state)


def test_two_names_of_one_head(with_heads):
    model = with_heads(place="two", new=FAMILIES["gpt2"].make, head="lm_head")
    other = with_heads(place="two", new=FAMILIES["gpt2"].make, head="lm_head", seed=7)
    assert model.lm_head.weight is model.transformer.wte.weight
    ll.set_adapter(model, "one")
    model.load_state_dict(ll.adapter_state_dict(other))
    assert_same(of_each(model), of_each(other))


def test_adapters_on_parameters():
    model = nn.Sequential(nn.LSTM(4, 4))
    ll.inject(model, ll.LoRAConfig(target_modules=None, target_parameters=["weight_ih_l0"], r=2))
    randomise(model)
    state = {key: value * 2 for key, value in ll.adapter_state_dict(model).items()}
    model.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in ll.adapter_state_dict(model).items())


def test_the_best_checkpoint_after_a_fit(tmp_path):
    """As one does in Lightning, and other libraries do (GluonTS)."""
    module = Lit()
    run = trainer(ll.LoRA(r=2, lora_alpha=8), max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, data())
    trained = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    randomise(module)
    module.load_state_dict(torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"])
    assert all(torch.equal(value, trained[key]) for key, value in ll.adapter_state_dict(module).items())


@pytest.mark.parametrize("off", [ll.eject, ll.merge_and_unload])
def test_nothing_is_left_of_it(off):
    model = build()
    ll.inject(model, CONFIGS["lora"])
    off(model)
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks
    assert vars(model).keys() == vars(build()).keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
