"""What holds for every adapter and for every damage: a folder gives back what was saved in it, or nothing at all."""

import copy
import string
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from lightning_lora.arguments import name_problems
from lightning_lora.injection.inject import carry_out, initialise
from lightning_lora.layers import lora_layers

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASTERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
stable = settings(deadline=None, max_examples=25, derandomize=True, database=None)


class Mixed(nn.Module):
    """Layers of every kind that PEFT has, in an order that shapes allow."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": Conv1D(10, 8), "down": nn.Linear(10, 8)}) for _ in range(2))
        self.line, self.square = nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.table(ids))
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        x = self.line(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.square(x[:, None]).mean(1)))


SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {
    "vocab_size": 11,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "mixed": (Mixed, ["table", "first", "up", "down", "line", "square"], ["norm", "head"]),
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, pad_token_id=0)),
        ["embed_tokens", "q_proj", "v_proj", "up_proj", "down_proj"],
        ["lm_head", "norm"],
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, tie_word_embeddings=False)),
        ["wte", "c_attn", "c_fc"],
        ["lm_head", "ln_f"],
    ),
    "bert": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)),
        ["word_embeddings", "query", "value", "dense"],
        ["classifier"],
    ),
}
IDS = torch.arange(1, 9).view(2, 4)

names = st.text(string.ascii_letters + string.digits + "_-öß漢", min_size=1, max_size=9).filter(
    lambda name: not name_problems(name)
)
ranks = st.integers(1, 4)
alphas = st.one_of(st.integers(-9, 40), st.floats(-50, 50)).filter(lambda alpha: abs(alpha) > 0.01)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, torch.dtype, torch.dtype, dict, str, int]:
    """A model, its dtype and that of the adapter, a configuration, a name, and a seed for the values."""
    name = draw(st.sampled_from([*MODELS]))
    _, layers, modules = MODELS[name]
    targets = draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    some = st.sampled_from(targets)
    dora = draw(st.booleans())
    fields = {
        "r": draw(ranks),
        "lora_alpha": draw(alphas),
        "rank_pattern": draw(st.none() | st.dictionaries(some, ranks, min_size=1)),
        "alpha_pattern": draw(st.none() | st.dictionaries(some, alphas, min_size=1)),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1, 0.75])),
        "use_rslora": draw(st.booleans()),
        "use_dora": dora,
        "dora_dropout": draw(st.sampled_from(["input", "lora"])) if dora else "input",
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "init_lora_weights": draw(st.sampled_from(["kaiming", "gaussian", "pissa", "olora"])),
        "modules_to_save": draw(st.none() | st.lists(st.sampled_from(modules), min_size=1, unique=True)),
        "target_modules": targets,
    }
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(MASTERS))
    return name, *dtypes, fields, draw(names), draw(st.integers(0, 1 << 16))


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def randomise(model: nn.Module, seed: int) -> None:
    """All that is trained gets other values, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (noise * 10 ** torch.randn(1, generator=generator).item() * 0.1).to(parameter.dtype)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit: also where 0 is -0, and where a result is not finite."""
    return first.dtype == second.dtype and first.shape == second.shape and bytes_of(first) == bytes_of(second)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor).encode()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ll.adapter_state_dict(model).items()}


def assert_same_adapter(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = ll.adapter_state_dict(first), ll.adapter_state_dict(second)
    assert set(ours) == set(theirs)
    assert not [key for key in ours if not same(ours[key], theirs[key])]
    layers = {name: layer.lora_adapters() for name, layer in lora_layers(second)}
    for layer_name, layer in lora_layers(first):
        assert layer.lora_adapters().keys() == layers[layer_name].keys()
        for name, adapter in layer.lora_adapters().items():
            other = layers[layer_name][name]
            assert (type(adapter), adapter.r, adapter.scaling) == (type(other), other.r, other.scaling)
            fields = ("lora_dropout", "use_dora", "use_rslora", "dora_dropout", "bias", "init_lora_weights")
            assert [getattr(adapter.config, f) for f in fields] == [getattr(other.config, f) for f in fields]
    assert same(outputs(first), outputs(second))


@stable
@given(case=cases())
def test_what_is_loaded_is_what_was_saved(case):
    name, dtype, master, fields, adapter_name, seed = case
    base = build(name, dtype)
    model = copy.deepcopy(base)
    config = ll.LoRAConfig(**fields)
    carry_out(model, config, ll.plan(model, config), adapter_name, master)
    initialise(model)
    randomise(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        ll.save_adapter(model, one, adapter_name)
        again = copy.deepcopy(base)
        ll.load_adapter(again, one)
        assert list(ll.adapters(again)) == [adapter_name]
        assert_same_adapter(model, again)
        ll.save_adapter(again, two, adapter_name)
        third = copy.deepcopy(base)
        ll.load_adapter(third, two)
        ll.save_adapter(third, Path(folder) / "three", adapter_name)
        for file in FILES:
            assert (two / file).read_bytes() == (Path(folder) / "three" / file).read_bytes(), file
        assert (one / FILES[0]).read_bytes() == (two / FILES[0]).read_bytes()
        ll.load_adapter(model, two)  # into the adapter that it was
        assert_same_adapter(model, again)


def picture(model: nn.Module) -> tuple:
    """Everything about a model that loading could change."""
    tensors = {key: bytes_of(value) for key, value in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    modules = {key: (type(m), m.training, sorted(vars(m))) for key, m in model.named_modules()}
    return tensors, flags, modules, ll.adapters(model), {n: layer.lora_active for n, layer in lora_layers(model)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[nn.Module, dict[str, bytes]]:
    """A model with an adapter that has a bit of everything, and the files of it."""
    model = build("llama")
    fields = {
        "r": 2,
        "use_dora": True,
        "bias": "none",
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"up_proj": 5.5},
    }
    targets = ["q_proj", "v_proj", "up_proj"]
    ll.inject(model, ll.LoRAConfig(**fields, target_modules=targets, modules_to_save=["norm"]), "korean")
    randomise(model, 3)
    folder = tmp_path_factory.mktemp("saved")
    ll.save_adapter(model, folder / "a", "korean")
    return model, {file: (folder / "a" / file).read_bytes() for file in FILES[:2]}


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, str, float, int]]:
    """Some changes: of which file, of what kind, where, and with what."""
    one = st.tuples(
        st.sampled_from(FILES[:2]),
        st.sampled_from(["flip", "insert", "delete", "set", "truncate", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def damaged(data: bytes, kind: str, where: float, value: int) -> bytes:
    place = int(where * len(data))
    rest = data[place + 1 :]
    match kind:
        case "flip":
            return data[:place] + bytes([data[place] ^ (1 << value % 8)]) + rest if data else data
        case "set":
            return data[:place] + bytes([value]) + rest
        case "insert":
            return data[:place] + bytes([value]) + data[place:]
        case "delete":
            return data[:place] + rest
        case "truncate":
            return data[:place]
    return data[place:] + data[:place]


@settings(stable, max_examples=300)
@given(changes=damages())
def test_damage_is_refused_or_does_not_matter(saved, changes):
    """Any bytes: what is loaded is the adapter that was saved, or the model stays what it is."""
    model, files = saved
    files = dict(files)
    for file, kind, where, value in changes:
        files[file] = damaged(files[file], kind, where, value)
    loaded_or_refused(model, files, build("llama"))
    loaded_or_refused(model, files, copy.deepcopy(model))


def test_every_bit_of_the_configuration(saved):
    model, files = saved
    bare = build("llama")
    for place in range(len(files[FILES[0]])):
        for bit in (0, 3, 5):
            data = bytearray(files[FILES[0]])
            data[place] ^= 1 << bit
            bare = loaded_or_refused(model, {**files, FILES[0]: bytes(data)}, bare)


def loaded_or_refused(model: nn.Module, files: dict[str, bytes], other: nn.Module) -> nn.Module:
    """Loads the files into another model, and gives back one that nothing was loaded into."""
    before = picture(other)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        try:
            ll.load_adapter(other, folder)
        except (ll.CheckpointError, ll.UnsupportedError):
            assert picture(other) == before
            return other
    assert_same_adapter(model, other)
    return build("llama")
