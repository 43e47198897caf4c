"""PEFT folders, both ways, on real architectures: equal logits, equal meaning, equal bytes."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from lightning_lora import comparators
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, VARIANTS, config_for, randomise

FIELDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 3, "1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 7, "v_proj": 5}},
    "regex": {"target_modules": r".*layers\.1\..*(q|up|down)_proj"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora-rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "embedding-dora": {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True},
    "in-full": {"modules_to_save": ["lm_head", "embed_tokens", "1.input_layernorm"]},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
]


def trained(base: nn.Module, **options) -> nn.Module:
    """A copy with an adapter as after training: everything that is trained is far from where it started."""
    model = copy.deepcopy(base)
    ll.inject(model, ll.LoRAConfig(**{"r": 4, "lora_alpha": 6, **options}))
    randomise(model)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora." not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model.eval()(**batch).logits


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).norm() <= 4e-6 * theirs.norm()  # a dozen layers, in float32, summed in another order


def from_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def round_trips(base: nn.Module, model: nn.Module, batch: dict, folder: Path) -> dict:
    """Saved here, loaded in PEFT, transformers and here; saved in PEFT, loaded here; saved twice, the same bytes."""
    ours = logits(model, batch)
    assert (ours - logits(base, batch)).norm() > 0.05 * ours.norm(), "the adapter should matter in this test"
    ll.save_adapter(model, folder / "one")
    theirs = from_peft(base, folder / "one")
    assert_equal(logits(theirs, batch), ours)
    again = copy.deepcopy(base)
    ll.load_adapter(again, folder / "one")
    assert torch.equal(logits(again, batch), ours)
    assert any(parameter.requires_grad for parameter in again.parameters())
    ll.save_adapter(again, folder / "two")
    third = copy.deepcopy(base)
    ll.load_adapter(third, folder / "two")
    ll.save_adapter(third, folder / "three")
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (folder / "two" / file).read_bytes() == (folder / "three" / file).read_bytes(), file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder / "peft")
    back = copy.deepcopy(base)
    ll.load_adapter(back, folder / "peft")
    assert_equal(logits(back, batch), ours)
    return json.loads((folder / "one" / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore:bias=.* trains nothing")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_every_field(tmp_path, fields):
    family = FAMILIES["llama"]
    base = family.make().eval()
    batch = family.batch(base)
    model = trained(base, **fields)
    config = round_trips(base, model, batch, tmp_path)
    plain = copy.deepcopy(base)
    plain.load_adapter(str(tmp_path / "one"))  # transformers' own
    assert_equal(logits(plain, batch), logits(model, batch))
    targets = {name for name, m in model.named_modules() if hasattr(m, "lora_active")}
    twin = get_peft_model(copy.deepcopy(base), LoraConfig(**{k: v for k, v in config.items() if v is not None}))
    assert {n.removeprefix("base_model.model.") for n, m in twin.named_modules() if hasattr(m, "lora_A")} == targets


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_every_family(tmp_path, name, variant):
    """Heads that are trained in full, Conv1D, tied embeddings, convolutions, encoders and decoders."""
    family = FAMILIES[name]
    base = family.make().eval()
    batch = family.batch(base)
    model = trained(base, target_modules=family.target_modules, **variant)
    config = round_trips(base, model, batch, tmp_path)
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert bool(config["modules_to_save"]) == bool(family.heads)
    assert config["task_type"] == {
        "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama-classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM",
        "vit": None, "whisper": None, "convnet": None,
    }.get(name, "CAUSAL_LM")  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name",
    ["linear", "linear-no-bias", "gpt2-conv1d", "embedding", "embedding-scaled", "conv1d", "conv2d-plain", "conv3d"],
)
def test_every_layer_in_float64(tmp_path, name, variant):
    case = CASES[name]
    model = case.model()
    ll.inject(model, config_for(variant))
    randomise(model)
    ll.save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(case.model(), str(tmp_path / "a"), autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(case.input()), model(case.input()), rtol=1e-10, atol=1e-10)
    again = case.model()
    ll.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(case.input()), model(case.input()))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("conv2d-groups", "0: in PEFT, A of a convolution with groups mixes all input channels"),
        ("conv2d", "0: in PEFT, A of a convolution has neither its dilation nor its padding mode"),
        ("conv2d-same-reflect", "0: in PEFT, A of a convolution has neither its dilation nor its padding mode"),
        ("embedding-max-norm", "0: PEFT limits the norm of the rows of A"),
        (
            "linear-user-scaled",
            "0: in PEFT, what ScaledLinear.forward does to the product would not be done to the update",
        ),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(tmp_path, name, why):
    model = CASES[name].model()
    ll.inject(model, config_for("lora"))
    with pytest.raises(ll.UnsupportedError, match=why):
        ll.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_a_function_of_the_model_asks_of_its_layers_too(tmp_path):
    """MobileNet gives its convolutions to a function that pads for their stride."""
    sizes = {"image_size": 32, "num_labels": 3, "depth_multiplier": 0.35, "min_depth": 8}
    model = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**sizes))
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["re:.*layer.1.expand_1x1.convolution"], modules_to_save=None))
    with pytest.raises(ll.UnsupportedError, match="MobileNetV2ConvLayer asks for its .*stride.*, which PEFT's wrapper"):
        ll.save_adapter(model, tmp_path / "a")


def test_a_module_of_several_names_that_is_trained_in_full(tmp_path):
    """Behind a resize the tables are one module: PEFT would train it under a name by which nothing calls it."""
    model = FAMILIES["t5"].make()
    rows = model.get_input_embeddings().weight.shape[0]
    for after in (False, True):
        if after:
            ll.eject(model)
            model.resize_token_embeddings(rows + 8, mean_resizing=False)
        ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["embed_tokens"]))
        if after:
            with pytest.raises(ll.UnsupportedError, match="has several names in the model, and PEFT would adapt it"):
                ll.save_adapter(model, tmp_path / "a")
        else:
            ll.save_adapter(model, tmp_path / "a")


def test_what_peft_would_rename_and_lose_is_refused(tmp_path):
    """Laguna's shared experts, to which transformers' name for older checkpoints is applied once more."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    config = transformers.LagunaConfig(**sizes, num_attention_heads_per_layer=[4, 4])

    def base():
        torch.manual_seed(0)
        return transformers.LagunaForCausalLM(config)

    model = trained(base(), target_modules=["up_proj", "q_proj"])
    with pytest.raises(
        ll.UnsupportedError, match=r"1.mlp.shared_experts.up_proj: PEFT renames such layers of a laguna"
    ):
        ll.save_adapter(model, tmp_path / "a")
    model = trained(base(), target_modules=["up_proj", "q_proj"], exclude_modules=["shared_experts.up_proj"])
    ll.save_adapter(model, tmp_path / "a")
    ids, theirs = torch.arange(8)[None], PeftModel.from_pretrained(base(), str(tmp_path / "a"))
    torch.testing.assert_close(theirs.eval()(ids).logits, model.eval()(ids).logits)
    own = get_peft_model(base(), LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    own.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"Found missing adapter keys .*1.mlp.shared_experts.up_proj"):
        PeftModel.from_pretrained(base(), str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("target", "why"), [("conv2", "its stride"), ("encoder.embed_positions", "its num_embeddings")]
)
def test_what_a_model_asks_of_its_layers_peft_does_not_have(target, why, tmp_path):
    """Whisper asks its convolutions for their strides: with PEFT's wrappers around them it can't run."""
    family = FAMILIES["whisper"]
    model = trained(family.make(), target_modules=[target, "q_proj"])
    with pytest.raises(ll.UnsupportedError, match=f"{target}: WhisperEncoder asks for {why}, which PEFT's wrapper"):
        ll.save_adapter(model, tmp_path / "a")
    twin = get_peft_model(family.make(), LoraConfig(target_modules=[target]))
    with pytest.raises(AttributeError, match=why.rpartition(" ")[2]):
        twin(**family.batch(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_started_with_a_part_of_the_weight(tmp_path, init):
    """PEFT decomposes the weight again when it loads such a folder; so do we, and W stays what it is."""
    family = FAMILIES["llama"]
    base = family.make().eval()
    batch = family.batch(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    twin = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    twin.save_pretrained(tmp_path / "peft")
    model = copy.deepcopy(base)
    ll.load_adapter(model, tmp_path / "peft")
    assert_equal(logits(model, batch), logits(twin, batch))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    ll.save_adapter(model, tmp_path / "clean")
    assert_equal(logits(from_peft(base, tmp_path / "clean"), batch), logits(twin, batch))
    assert json.loads((tmp_path / "clean" / "adapter_config.json").read_text())["r"] == 8


def test_an_adapter_that_started_with_a_part_goes_on_as_it_was(tmp_path):
    base = FAMILIES["llama"].make()
    model = trained(base, init_lora_weights="pissa")
    ll.save_adapter(model, tmp_path / "a")
    again = copy.deepcopy(base)
    ll.load_adapter(again, tmp_path / "a")
    for key, value in ll.adapter_state_dict(model).items():
        assert torch.equal(ll.adapter_state_dict(again)[key], value), key


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("init", ["kaiming", "loftq"])
def test_adapters_of_a_quantised_base(tmp_path, mode, init):
    """Written against the dense base, from which the packed one differs by what quantising lost."""
    base = FAMILIES["llama"].make().eval()
    batch = FAMILIES["llama"].batch(base)
    model = copy.deepcopy(base)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6, init_lora_weights=init))
    ll.quantize(model, mode)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    ll.save_adapter(model, tmp_path / "a")
    theirs = logits(from_peft(base, tmp_path / "a"), batch)
    assert (theirs - logits(model, batch)).norm() < 0.35 * theirs.norm()
    again = copy.deepcopy(base)
    with pytest.warns(UserWarning, match=f"trained on a base that is {mode}, this one is dense"):
        ll.load_adapter(again, tmp_path / "a")
    assert_equal(logits(again, batch), theirs)


def test_names_are_those_of_the_transformers_model(tmp_path):
    """Whether it is passed itself or in a LightningModule, compiled or not."""
    base = FAMILIES["llama"].make().eval()
    batch = FAMILIES["llama"].batch(base)
    outer = nn.Module()
    outer.model = trained(base)
    expected = logits(outer.model, batch)
    ll.save_adapter(outer, tmp_path / "outer")
    ll.save_adapter(outer.model, tmp_path / "inner")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "outer" / file).read_bytes() == (tmp_path / "inner" / file).read_bytes()
    compiled = nn.Module()
    compiled.model = torch.compile(trained(base), backend="eager")
    ll.save_adapter(compiled, tmp_path / "compiled")
    assert (
        load_file(tmp_path / "compiled" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "inner" / "adapter_model.safetensors").keys()
    )
    assert_equal(logits(from_peft(base, tmp_path / "compiled"), batch), expected)
    other = nn.Module()
    other.model = copy.deepcopy(base)
    ll.load_adapter(other, tmp_path / "inner")
    assert torch.equal(logits(other.model, batch), expected)


@pytest.mark.parametrize("name", ["model", "layers", "q_proj", "weight", "lora_A", "default", "A", "base_layer"])
def test_names_of_adapters_that_are_parts_of_keys(tmp_path, name):
    base = FAMILIES["llama"].make().eval()
    model = copy.deepcopy(base)
    ll.inject(model, ll.LoRAConfig(r=2), name)
    randomise(model)
    ll.save_adapter(model, tmp_path / "a", name)
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * 14
    again = copy.deepcopy(base)
    ll.load_adapter(again, tmp_path / "a")
    assert list(ll.adapters(again)) == [name]
    batch = FAMILIES["llama"].batch(base)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert_equal(logits(from_peft(base, tmp_path / "a"), batch), logits(model, batch))


def test_what_a_folder_says_of_itself(tmp_path):
    base = FAMILIES["bert"].make()
    model = trained(base, target_modules=["query", "value"])
    ll.save_adapter(model, tmp_path / "a", step=120)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["lightning_lora"])
    assert entry["step"] == 120
    assert entry["config"]["r"] == 4
    assert entry["sha256"].keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert entry["base"]["quantization"] is None
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\n")
    for words in (
        "library_name: peft",
        "text-classification",
        "`query`, `value`",
        "`classifier`",
        "PeftModel.from_pretrained",
    ):
        assert words in card, words


OF_PEFT_0_13 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_folder_says_nothing_that_an_older_peft_refuses(tmp_path, use_dora):
    """Up to 0.13 it takes no fields that it doesn't know, empty ones neither."""
    model = nn.Sequential(nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=use_dora))
    ll.save_adapter(model, tmp_path / "a")
    assert set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())) <= OF_PEFT_0_13


def test_other_files_in_the_folder_stay(tmp_path):
    model = trained(FAMILIES["llama"].make())
    folder = tmp_path / "a"
    (folder / "more").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("mine")
    (folder / "more" / "adapter_config.json").write_text("mine too")
    (folder / "adapter_config.json").write_text("old")
    ll.save_adapter(model, folder)
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert (folder / "more" / "adapter_config.json").read_text() == "mine too"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert not [p for p in tmp_path.iterdir() if p != folder]


def test_a_head_in_a_head_of_the_same_name_is_refused(tmp_path):
    """PEFT would wrap both, and load neither."""
    head = nn.Module()
    head.head = nn.Linear(8, 3)
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": head})
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["re:head"]))
    with pytest.raises(ll.UnsupportedError, match=r"head: PEFT goes by ends of names, and would take head.head for it"):
        ll.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("config", [ll.LoRAConfig(r=2), comparators.PromptTuningConfig(num_virtual_tokens=3)])
def test_a_folder_with_its_base_model_gets_none(tmp_path, config):
    """Transformers would load it with the model from then on, unasked."""
    model = FAMILIES["llama"].make()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ll.inject(model, config)
    with pytest.raises(ll.ConfigError, match=r"holds a model \(config.json, model.safetensors\), .*another folder"):
        ll.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    ll.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_card_that_somebody_else_wrote_stays(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for text in ("# Notes\n\n- lightning-lora\n", "---\ntags:\n- lora\n---\n- lightning-lora\n"):
        (folder / "README.md").write_text(text)
        for r in (2, 3):
            ll.save_adapter(trained(FAMILIES["llama"].make(), r=r), folder)
        assert (folder / "README.md").read_text() == text
    (folder / "README.md").unlink()
    for r in (2, 3):
        ll.save_adapter(trained(FAMILIES["llama"].make(), r=r), folder)
        assert f"| rank | {r} |" in (folder / "README.md").read_text()
    ours = (folder / "README.md").read_text()
    for edited in (f"{ours}\nEvaluated on X: 0.93\n", ours.replace("# An adapter", "# My adapter")):
        (folder / "README.md").write_text(edited)
        ll.save_adapter(trained(FAMILIES["llama"].make()), folder)
        assert (folder / "README.md").read_text() == edited


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = trained(FAMILIES["llama"].make())
    ll.save_adapter(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for broken in ("write_tensors", "write_config", "put_card"):
        with monkeypatch.context() as patch:
            patch.setattr(
                f"lightning_lora.formats.peft_write.{broken}", lambda *args: (_ for _ in ()).throw(OSError("disk full"))
            )
            with pytest.raises(OSError, match="disk full"):
                ll.save_adapter(model, tmp_path / "a")
        assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ll.ConfigError, match="is a file: give a folder"):
        ll.save_adapter(model, tmp_path / "file")
    with pytest.raises(ll.ConfigError, match="the current folder"):
        ll.save_adapter(model, ".")


def test_what_diverged_is_not_saved(tmp_path):
    model = trained(FAMILIES["llama"].make())
    model.model.layers[0].self_attn.q_proj.lora["default"].B.data[0, 0] = float("nan")
    with pytest.raises(ll.CheckpointError, match="q_proj.lora_B.weight hold NaN or infinite values: the run diverged"):
        ll.save_adapter(model, tmp_path / "a")
    with pytest.raises(ll.ConfigError, match="there is no adapter 'defualt'. Did you mean 'default'"):
        ll.save_adapter(model, tmp_path / "a", "defualt")
    assert not (tmp_path / "a").exists()


# ---- what others found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": {"lm_head": [5, 7]}},
        {"trainable_token_indices": {"lm_head": [5, 7], "embed_tokens": [7, 9]}},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["head", "embedding", "both", "rows-of-the-head", "rows-of-both", "head-beside-lora", "embedding-beside-lora"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_peft_untied_is_not_loaded_into_what_is_tied(tmp_path, options, wrapped):
    """What the error says to do helps: the model is the same one, untied, and stays so in files."""
    base = FAMILIES["qwen2-tied"].make().eval()
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.1 * (i + 1))
    theirs.save_pretrained(tmp_path)
    net = copy.deepcopy(base)
    model = nn.ModuleList([net]) if wrapped else net
    with pytest.raises(ll.CheckpointError, match=r"untie them before .*tie_word_embeddings = False`") as caught:
        ll.load_adapter(model, tmp_path)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in net.state_dict().items())
    exec(re.search("`(.*?)`", str(caught.value))[1], {"model": net, "torch": torch})
    ll.load_adapter(model, tmp_path)
    batch = FAMILIES["qwen2-tied"].batch(base)
    assert_equal(logits(net, batch), logits(theirs, batch))
    ll.merge_and_unload(net).save_pretrained(tmp_path / "merged")
    assert_equal(logits(type(net).from_pretrained(tmp_path / "merged"), batch), logits(theirs, batch))


TYING = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["model.embed_tokens"]},
    {"target_modules": ".*embed_tokens"},
]


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules")
@pytest.mark.parametrize("options", TYING, ids=str)
def test_tying_that_is_asked_for(tmp_path, options):
    base = FAMILIES["qwen2-tied"].make().double().eval()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, ensure_weight_tying=True, **options)).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.1 * (i + 1))
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    if "embed_tokens" in str(options["target_modules"]):
        with pytest.raises(ll.UnsupportedError, match="ensure_weight_tying=True is not supported"):
            ll.load_adapter(model, tmp_path)
        return
    ll.load_adapter(model, tmp_path)
    batch = FAMILIES["qwen2-tied"].batch(base)
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), rtol=1e-9, atol=1e-9)
    ll.save_adapter(model, tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, batch), logits(theirs, batch), rtol=1e-9, atol=1e-9)


ROWS = {"embed_tokens": [5, 7], "lm_head": [5, 7]}
PROMISES = {
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, "1.mlp.experts",
        r"target_parameters names model.layers.1.mlp.experts.gate_up_proj, model.layers.1.mlp.experts.down_proj, and"),
    "all-experts": ("mixtral", {"target_parameters": ["gate_up_proj"]}, ".experts",
        r"target_parameters names model.layers.0.mlp.experts.gate_up_proj, model.layers.1.mlp.experts.gate_up_proj,"),
    "rows": ("llama", {"trainable_token_indices": [5, 7]}, "token_adapter", "names the token embedding, and there"),
    "rows-of-one": ("llama", {"trainable_token_indices": ROWS}, "lm_head.token", "token_indices names lm_head, and"),
    "biases": ("opt", {"bias": "all"}, "0.fc1.bias", r"bias='all' trains model.decoder.layers.0.fc1.bias, and there"),
    "all-biases": ("opt", {"bias": "all"}, "bias", r"bias='all' trains .* more, and there"),
    "biases-lora_only": ("opt", {"bias": "lora_only"}, "0.self_attn.q_proj.base_layer.bias",
        r"'lora_only' trains model.decoder.layers.0.self_attn.q_proj.bias, .*set bias to 'none'"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "lost", "message"), PROMISES.values(), ids=PROMISES)
def test_tensors_that_the_configuration_promises(tmp_path, name, options, lost, message):
    make = FAMILIES[name].make
    get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj"], **options)).save_pretrained(tmp_path)
    ll.load_adapter(make(), tmp_path)
    without(tmp_path, lost)
    model = make()
    with pytest.raises(ll.CheckpointError, match=f"tensors are missing: .*{message}"):
        ll.load_adapter(model, tmp_path)
    assert not ll.adapters(model)


def without(folder: Path, part: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    left = {key: tensor for key, tensor in tensors.items() if part not in key}
    assert len(left) < len(tensors)
    save_file(left, folder / "adapter_model.safetensors")


def test_biases_that_older_versions_of_peft_lost(tmp_path):
    """Those of bias="lora_only": they can be done without, if one says so."""
    make, config = FAMILIES["opt"].make, LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")
    get_peft_model(make(), config).save_pretrained(tmp_path)
    without(tmp_path, "bias")
    with pytest.raises(ll.CheckpointError, match="set bias to 'none' in adapter_config.json"):
        ll.load_adapter(make(), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "bias": "none"}))
    ll.load_adapter(make(), tmp_path)


def test_rows_of_a_tied_table_are_there_once(tmp_path):
    make, config = FAMILIES["qwen2-tied"].make, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS)
    get_peft_model(make(), config).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("token_adapter" in key for key in keys) == 1
    ll.load_adapter(make(), tmp_path)


@pytest.mark.parametrize("saved", [None, ["pooler"]])
def test_a_frozen_head_is_not_taken_for_a_trained_one(tmp_path, saved):
    """PEFT adds heads to modules_to_save by itself, by the task."""
    base = FAMILIES["bert"].make().eval()
    model = trained(base, target_modules="attention", modules_to_save=saved)
    folder = tmp_path / "adapter"
    ll.save_adapter(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] is None
    assert ll.lint(folder, "peft") == []
    batch = {"input_ids": torch.randint(3, 61, (2, 7))}
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(theirs(**batch).logits, model.eval()(**batch).logits, rtol=1e-6, atol=1e-6)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    assert "set task_type to null" in str(*ll.lint(folder, "peft"))


def test_an_interrupt_loses_nothing(tmp_path, monkeypatch):
    model = trained(FAMILIES["llama"].make())
    ll.save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 3:  # the new one, which fails; the old one; the new one again
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr("lightning_lora.formats.folder.exchanged", lambda *folders: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ll.save_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
