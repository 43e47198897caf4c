"""Configuration: every problem at once, unknown names with the nearest one, plain types out and in."""

import json
import math

import pytest

import lightning_lora as ll
from lightning_lora.inits import Gaussian, PiSSA


def test_all_problems_are_reported_at_once():
    with pytest.raises(ll.ConfigError) as caught:
        ll.LoRAConfig(
            r=0,
            lora_alpha=0,
            lora_dropout=1.0,
            target_modules=[],
            exclude_modules=["re:("],
            layers_to_transform=[-1],
            rank_pattern={"q_proj": 0},
            alpha_pattern={"q_proj": math.inf},
            dora_dropout="lorra",
            bias="lora-only",
            init_lora_weights="kaimin",
            modules_to_save="aut",
        )
    text = str(caught.value)
    for part in ("r must", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"):
        assert part in text
    for part in ("rank_pattern", "alpha_pattern", "dora_dropout", "bias", "init_lora_weights", "modules_to_save"):
        assert part in text
    assert "12 problems" in text
    assert len(caught.value.problems) == 12
    for suggestion in ("'lora_only'", "'kaiming'", "'auto'", "'lora'"):
        assert f"Did you mean {suggestion}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 2.0}, "r must be a positive integer, got 2.0"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"r": -1}, "positive integer"),
        ({"lora_alpha": math.nan}, "finite"),
        ({"lora_alpha": "16"}, "finite"),
        ({"lora_dropout": -0.1}, r"\[0, 1\)"),
        ({"target_modules": "a("}, "not a valid regex"),
        ({"target_modules": "all_linear"}, None),
        ({"target_modules": [""]}, "not a name"),
        ({"target_modules": None}, "empty"),
        ({"target_modules": ["re:["]}, "not a valid regex"),
        ({"layers_to_transform": []}, "layer indices"),
        ({"layers_to_transform": {}}, "empty"),
        ({"layers_to_transform": {"tower": []}}, "tower"),
        ({"rank_pattern": ["q"]}, "must map patterns"),
        ({"rank_pattern": {"re:(": 2}}, "not a valid regex"),
        ({"alpha_pattern": {3: 2.0}}, "holds 3, which is no pattern"),
        ({"use_dora": 1}, "true or false"),
        ({"dora_dropout": "lora"}, "no effect without use_dora"),
        ({"init_lora_weights": True}, "PEFT's True is 'kaiming'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"PEFT's pissa_niter_4 is lightning_lora.inits.PiSSA\(niter=4\) here"),
        ({"init_lora_weights": PiSSA}, r"must be a name or an object, got the class PiSSA: PiSSA\(\)"),
        ({"modules_to_save": "head"}, r"For one module: \['head'\]"),
        ({"modules_to_save": []}, "empty"),
    ],
)
def test_single_problems(arguments, message):
    if message is None:  # a regex like any other, which then matches nothing in a model
        ll.LoRAConfig(**arguments)
        return
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRAConfig(**arguments)


def test_callback_reports_its_own_problems_together_with_those_of_the_config():
    with pytest.raises(ll.ConfigError) as caught:
        ll.LoRA(r=0, adapter_dtype="float23", adapter_name="a.b", loraplus_lr_ratio=-1, quantization="nf3")
    assert len(caught.value.problems) == 5
    assert "Did you mean 'float32'" in str(caught.value)


@pytest.mark.parametrize(
    "flag", ["gradient_checkpointing", "save_peft", "sync_base", "shard_adapters", "save_sharded", "use_dora"]
)
def test_flags_are_no_texts(flag):
    with pytest.raises(ll.ConfigError, match=f"{flag} must be true or false, got 'no'"):
        ll.LoRA(**{flag: "no"})


def test_no_target_modules_as_peft_says_it():
    """Beside something else that is adapted."""
    for targets in ({"target_parameters": ["a.weight"]}, {"trainable_token_indices": [1]}):
        assert ll.LoRAConfig(target_modules=None, **targets) == ll.LoRAConfig(target_modules=[], **targets)


def test_configs_share_nothing_with_what_they_came_from_or_give():
    towers, patterns = {"vision": (0, 1)}, {"q": 2}
    config = ll.LoRAConfig(layers_to_transform=towers, rank_pattern=patterns, target_modules=["q"])
    assert config.layers_to_transform == {"vision": [0, 1]}
    given = config.to_dict()
    for mutable in (patterns, given["rank_pattern"], given["layers_to_transform"]):
        mutable.clear()
    given["target_modules"].append("v")
    assert config.rank_pattern == {"q": 2}
    assert config.target_modules == ["q"]
    assert config.layers_to_transform == {"vision": [0, 1]}


def test_registered_inits_are_known_by_their_name():
    from lightning_lora.config import INITS
    from lightning_lora.inits import init

    @init("my-own")
    class Mine(Gaussian):
        pass

    try:
        assert ll.LoRAConfig(init_lora_weights="my-own").to_dict()["init_lora_weights"] == "my-own"
        assert ll.LoRAConfig(init_lora_weights=Mine()).to_dict()["init_lora_weights"] == "my-own"
    finally:
        del INITS["my-own"]
    loaded = ll.LoRAConfig.from_dict({"init_lora_weights": "my-own"})
    assert loaded.to_dict()["init_lora_weights"] == "my-own"
    with pytest.raises(ll.UnsupportedError, match="'my-own' is known by name only"):
        loaded.init_lora_weights()


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "forward", "..", "a/b", 3])
def test_adapter_names_that_cannot_be_keys(name):
    with pytest.raises(ll.ConfigError, match="adapter_name"):
        ll.LoRA(adapter_name=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "nf5"}, "nf4"), ({"blocksize": 48}, "power of two"), ({"compute_dtype": "bf16"}, "bfloat16")],
)
def test_quantization_is_checked(arguments, message):
    with pytest.raises(ll.ConfigError, match=message):
        ll.Quantization(**arguments)


def test_plain_types_out_and_in():
    config = ll.LoRAConfig(r=4, target_modules=("q", "v"), rank_pattern={"q": 2}, init_lora_weights=Gaussian())
    values = json.loads(json.dumps(config.to_dict()))
    assert values["target_modules"] == ["q", "v"]
    assert values["init_lora_weights"] == "gaussian"
    assert ll.LoRAConfig.from_dict(values).to_dict() == values
    with pytest.raises(ll.ConfigError, match=r"unknown field 'lora_alhpa'. Did you mean 'lora_alpha'"):
        ll.LoRAConfig.from_dict({"lora_alhpa": 3})


def test_a_config_does_not_change_with_the_callers_list():
    targets = ["q_proj"]
    config = ll.LoRAConfig(target_modules=targets)
    targets.append("v_proj")
    assert config.target_modules == ["q_proj"]
    with pytest.raises(AttributeError):
        config.r = 3


def test_error_hierarchy():
    for error, builtin in [
        (ll.ConfigError, ValueError),
        (ll.TargetError, ValueError),
        (ll.CheckpointError, RuntimeError),
        (ll.UnsupportedError, NotImplementedError),
        (ll.DeadAdapterError, RuntimeError),
    ]:
        assert issubclass(error, builtin)
        assert issubclass(error, ll.LightningLoRAError)
    assert issubclass(ll.BaseMismatchError, ll.CheckpointError)
