"""Where "all-linear" reaches little of a model, the plan says what names the rest."""

import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll


class Recurrent(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.rnn = nn.LSTM(8, width)
        self.proj = nn.Linear(width, 4)

    def forward(self, ids):
        return self.proj(self.rnn(self.embed(ids))[0])


def notes(model: nn.Module, **options: object) -> list[str]:
    return [n for n in ll.plan(model, ll.LoRAConfig(r=2, **options)).notes if n.startswith("adapters are on")]


def test_matrices_that_a_module_reads():
    (note,) = notes(Recurrent())
    assert note == (
        f"adapters are on 128 of {128 + 4 * 32 * (8 + 32):,} weights, as most are in no linear layers. Matrices that "
        "modules read themselves can be adapted by target_parameters: rnn.weight_ih_l0, rnn.weight_hh_l0"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["rnn.weight_ih_l0"]},  # they are known then
        {"target_modules": ["proj"]},
        {"modules_to_save": ["rnn"]},
        {"exclude_modules": ["rnn"]},
    ],
)
def test_where_it_is_meant(options):
    assert not notes(Recurrent(), **options)


def test_convolutions_and_a_head():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 4))
    (note,) = notes(net, modules_to_save=None)
    assert note == (
        "adapters are on 128 of 5,168 weights, as most are in no linear layers. A list or a regex can name others: "
        "2 of type Conv2d"
    )
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 64))
    assert not notes(wide, modules_to_save=["3"]), "what is trained in full is trained"
    for parameter in net[:2].parameters():
        parameter.requires_grad_(False)
    assert not notes(net, modules_to_save=None), "it was frozen before"


def test_experts():
    config = tf.MixtralConfig(num_hidden_layers=3)
    with torch.device("meta"):
        model = tf.MixtralForCausalLM(config)
    (note,) = notes(model)
    assert note.endswith("are in no linear layers. target_parameters='experts' adapts the experts of 3 layers")
    assert not notes(model, target_parameters="experts")


def test_layers_that_are_packed_count_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 128))
    assert (before := notes(model))
    ll.quantize(model, ll.Quantization(mode="nf4"))
    assert notes(model) == before


def test_it_is_a_warning():
    with pytest.warns(UserWarning, match="adapters are on 128 of 5,248 weights"):
        ll.inject(Recurrent(), ll.LoRAConfig(r=2))


class Linear(nn.Module):
    """As graph networks have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_linears_that_are_not_torchs_own():
    model = nn.ModuleDict({"conv": nn.ModuleDict({"lin": Linear(), "lin_r": Linear()}), "out": nn.Linear(8, 8)})
    (note,) = ll.plan(model, ll.LoRAConfig(r=2)).notes
    assert note.startswith("conv.lin, conv.lin_r: of tests.test_reach.Linear, which is no torch.nn.Linear")
    assert "target_parameters=['lin.weight', 'lin_r.weight'] adapts it" in note
    plan = ll.plan(model, ll.LoRAConfig(r=2, target_parameters=["lin.weight", "lin_r.weight"]))
    assert [target.name for target in plan.targets] == ["out", "conv.lin.weight", "conv.lin_r.weight"]
    for options in ({"exclude_modules": ["conv.*", "lin", "lin_r"]}, {"modules_to_save": ["conv"]}):
        assert not ll.plan(model, ll.LoRAConfig(r=2, **options)).notes
