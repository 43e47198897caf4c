"""The plan: every form of pattern, every role, every message."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import lightning_lora as ll
from tests.helpers.families import DECODER, FAMILIES, KV, SMALL, ConvNet
from tests.helpers.modules import Wrapped
from tests.helpers.toy import build


def names(model: nn.Module, **options: object) -> list[str]:
    return [t.name for t in ll.plan(model, ll.LoRAConfig(**options)).targets]


def llama() -> nn.Module:
    return FAMILIES["llama"].make()


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.norm = nn.LayerNorm(width)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 5)


def test_plan_changes_nothing():
    model = llama()
    before, modules, rng = (
        copy.deepcopy(model.state_dict()),
        [vars(m).copy() for m in model.modules()],
        torch.get_rng_state(),
    )
    ll.plan(model, ll.LoRAConfig())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [vars(m) for m in model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q"]}, ["blocks.0.attn.q", "blocks.1.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": ["attn.q"]}, ["blocks.0.attn.q", "blocks.1.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": ["blocks.1.attn.q"]}, ["blocks.1.attn.q"]),
        ({"target_modules": ["blocks.*.q"]}, ["blocks.0.attn.q", "blocks.1.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": ["blocks.[02].attn.q"]}, ["blocks.0.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": [r"re:blocks\.\d\.attn\.v"]}, ["blocks.0.attn.v", "blocks.1.attn.v", "blocks.2.attn.v"]),
        (
            {"target_modules": r"blocks\.0\..*"},
            ["blocks.0.attn.q", "blocks.0.attn.v", "blocks.0.mlp.0", "blocks.0.mlp.2"],
        ),
        ({"target_modules": "attention"}, [f"blocks.{i}.attn.{n}" for i in range(3) for n in "qv"]),
        ({"target_modules": ["re:.*q", "*head*"]}, ["blocks.0.attn.q", "blocks.1.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": "mlp"}, [f"blocks.{i}.mlp.{n}" for i in range(3) for n in (0, 2)]),
        ({"target_modules": ["embed", "attention"], "layers_to_transform": 1}, ["blocks.1.attn.q", "blocks.1.attn.v"]),
        ({"target_modules": ["embed"]}, ["embed"]),
        ({"target_modules": ["head"], "modules_to_save": None}, ["head"]),
        ({"exclude_modules": ["mlp"]}, [f"blocks.{i}.attn.{n}" for i in range(3) for n in "qv"]),
        ({"exclude_modules": "attention"}, [f"blocks.{i}.mlp.{n}" for i in range(3) for n in (0, 2)]),
        (
            {"exclude_modules": r"blocks\.[12]"},
            ["blocks.0.attn.q", "blocks.0.attn.v", "blocks.0.mlp.0", "blocks.0.mlp.2"],
        ),
        ({"target_modules": ["q"], "layers_to_transform": [0, 2]}, ["blocks.0.attn.q", "blocks.2.attn.q"]),
        ({"target_modules": ["q"], "layers_to_transform": {"blocks": [2]}}, ["blocks.2.attn.q"]),
    ],
)
def test_forms_of_patterns(options, expected):
    assert names(Plain(), **options) == expected


def test_ranks_and_alphas_by_pattern():
    config = ll.LoRAConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={r"blocks\.0": 2, "mlp.*": 1, "q": 3},  # PEFT's regex of the end, a glob, a suffix
        alpha_pattern={"re:.*mlp.*": 5.0},
    )
    by_name = {t.name: (t.r, t.lora_alpha) for t in ll.plan(Plain(), config).targets}
    assert by_name["blocks.0.attn.q"] == (2, 6.0)  # the first match counts, and a container stands for its layers
    assert by_name["blocks.0.mlp.0"] == (2, 5.0)
    assert by_name["blocks.1.mlp.2"] == (1, 5.0)
    assert by_name["blocks.1.attn.q"] == (3, 6.0)
    assert by_name["blocks.1.attn.v"] == (4, 6.0)
    model = Plain()
    ll.inject(model, config)
    assert model.blocks[1].mlp[2].lora["default"].scaling == 5.0
    assert model.blocks[0].attn["q"].lora["default"].scaling == 3.0


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"target_modules": ["qq"]}, [r"target_modules: 'qq' matches nothing", "Did you mean 'q'"]),
        (
            {"target_modules": ["q", "blocks.0.attn.z"]},
            [r"'blocks.0.attn.z' matches nothing. Did you mean 'blocks.0.attn"],
        ),
        ({"target_modules": "q"}, [r"As a string it is a regex of the whole name; as a suffix it is \['q'\]"]),
        ({"target_modules": ["norm"]}, ["'norm' matches nothing that can be adapted", "LayerNorm"]),
        ({"exclude_modules": ["atn"]}, ["exclude_modules: 'atn' matches nothing. Did you mean 'attn'"]),
        ({"rank_pattern": {"k": 2}}, ["rank_pattern: 'k' matches nothing"]),
        ({"alpha_pattern": {"head": 2}}, ["alpha_pattern: 'head' matches nothing", "Only adapted layers count"]),
        ({"modules_to_save": ["haed"]}, ["modules_to_save: 'haed' matches nothing. Did you mean 'head'"]),
        ({"modules_to_save": ["1"]}, ["has no parameters to train"]),
        ({"layers_to_transform": [1, 7]}, ["there is no block 7; the model has blocks 0 to 2"]),
        ({"layers_to_transform": {"vision": [0]}}, ["no module is named 'vision'"]),
        ({"exclude_modules": ["blocks"]}, ["leaves no layer to adapt", "exclude_modules"]),
        ({"target_modules": ["q", "head"]}, [r"in modules_to_save \(that 'auto' found; give None or a list\)"]),
        (
            {"target_modules": ["head"], "modules_to_save": ["head"]},
            ["head is in target_modules, and head in modules_to_save: choose one"],
        ),
        (
            {"target_modules": ["qq"], "exclude_modules": ["zz"], "rank_pattern": {"yy": 1}},
            ["2 problems", "'qq'", "'zz'"],
        ),
    ],
)
def test_what_matches_nothing_is_an_error(options, messages):
    with pytest.raises(ll.TargetError) as caught:
        ll.plan(Plain(), ll.LoRAConfig(**options))
    import re

    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)


def test_towers():
    config = tf.CLIPConfig(
        text_config={**DECODER, "projection_dim": 16},
        vision_config={**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 16},
        projection_dim=16,
    )
    found = names(
        tf.CLIPModel(config), target_modules=["q_proj"], layers_to_transform={"vision_model": [1], "text_model": [0, 1]}
    )
    towers = [(name.partition("vision_model")[1] or "text_model", name.split("layers.")[1][0]) for name in found]
    assert sorted(towers) == [("text_model", "0"), ("text_model", "1"), ("vision_model", "1")]


# ---- roles ----------------------------------------------------------------------------------------------------------


def skipped(model: nn.Module) -> dict[str, str]:
    return dict(ll.plan(model, ll.LoRAConfig()).skipped)


def saved(model: nn.Module, **options: object) -> list[str]:
    return [m.name for m in ll.plan(model, ll.LoRAConfig(**options)).modules_to_save]


def test_output_embeddings_are_left_alone():
    assert skipped(llama()) == {"lm_head": "output embedding"}
    tied = FAMILIES["qwen2-tied"].make()
    assert skipped(tied) == {"lm_head": "output embedding"}
    (target,) = ll.plan(tied, ll.LoRAConfig(target_modules=["embed_tokens"])).targets
    assert target.tied == ("lm_head.weight",)

    class OwnLM(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.embed, self.mix, self.readout = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32, bias=False)
            if tie:
                self.readout.weight = self.embed.weight

    assert "tied to the input embedding" in skipped(OwnLM(tie=True))["readout"]
    assert "shaped like the token embedding" in skipped(OwnLM(tie=False))["readout"]


def test_a_masked_language_model_keeps_its_pretrained_head():
    model = tf.BertForMaskedLM(tf.BertConfig(**DECODER))
    assert skipped(model)["cls.predictions.transform.dense"] == "part of the pretrained language-model head"
    assert saved(model) == []


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4)), ["pre_classifier", "classifier"]),
        (lambda: tf.BertForTokenClassification(tf.BertConfig(**DECODER)), ["classifier"]),
        (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**DECODER)), ["qa_outputs"]),
        (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SMALL, vocab_size=31, num_feat_extract_layers=2, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)), ["lm_head"]),
        (lambda: tf.CLIPForImageClassification(tf.CLIPConfig(vision_config={**SMALL, "image_size": 8, "patch_size": 4})), ["classifier"]),
        (lambda: Plain(), ["head"]),
        (lambda: ConvNet(), ["head"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), []),
    ],
    ids=["distilbert", "token", "qa", "ctc", "clip", "plain", "convnet", "sequential"],
)  # fmt: skip
def test_new_heads_are_trained_in_full(build, heads):
    targets = ["features.*"] if build().__class__ is ConvNet else "all-linear"
    assert saved(Wrapped(build), target_modules=targets) == [f"net.{name}" for name in heads]


class OwnLinear(nn.Module):
    """A linear that is none of torch's, as torch_geometric has its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_layers_of_other_libraries_are_named_with_the_way_in():
    model = nn.ModuleDict({"gcn": nn.Sequential(OwnLinear()), "norm": nn.LayerNorm(3)})
    with pytest.raises(ll.TargetError, match=r"leaves no layer .* by target_parameters: gcn.0.weight$"):
        ll.plan(model, ll.LoRAConfig())
    found = ll.inject(model, ll.LoRAConfig(r=2, target_modules=[], target_parameters=["gcn.0.weight"]))
    assert [t.name for t in found.targets] == ["gcn.0.weight"]


def test_a_network_without_dense_linears():
    with pytest.raises(ll.TargetError, match=r"leaves no layer to adapt. Left out: head: trained in full"):
        ll.plan(ConvNet(), ll.LoRAConfig())
    with pytest.raises(ll.TargetError, match="A list or a regex can name others: 2 of type Conv"):
        ll.plan(ConvNet(), ll.LoRAConfig())


def test_heads_of_a_lightning_module_beside_a_pretrained_model():
    class WithHead(Wrapped):
        def __init__(self) -> None:
            super().__init__(lambda: tf.BertModel(tf.BertConfig(**DECODER)))
            self.projection = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
            self.temperature = nn.Parameter(torch.ones(()))
            self.teacher = nn.Linear(32, 8).requires_grad_(False)

    plan = ll.plan(WithHead(), ll.LoRAConfig())
    assert [m.name for m in plan.modules_to_save] == ["temperature", "projection"]
    assert plan.skipped["teacher"] == "outside the pretrained backbone, and frozen before LoRA came"
    assert all(t.name.startswith("net.") for t in plan.targets)


class Judged(pl.LightningModule):
    """A network that learns, and one that says how well."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.net, self.judge = build(), build().requires_grad_(not frozen)


def test_the_head_of_a_frozen_judge_is_not_trained():
    """But where everything is frozen: then the user did what LoRA does."""
    found = ll.plan(Judged(frozen=True), ll.LoRAConfig(r=2))
    assert [saved.name for saved in found.modules_to_save] == ["net.head"]
    assert found.skipped["judge.head"] == "frozen before LoRA came, beside net, which was not"
    assert not found.notes
    other = Judged(frozen=True)
    other.judge.more = nn.Linear(8, 8).requires_grad_(False)  # it is no twin any more
    found = ll.plan(other, ll.LoRAConfig(r=2))
    assert [saved.name for saved in found.modules_to_save] == ["net.head"]
    assert found.skipped["judge.head"] == "a head that was frozen before LoRA came"
    assert not found.notes
    both = ["net.head", "judge.head"]
    assert [s.name for s in ll.plan(Judged(frozen=False), ll.LoRAConfig(r=2)).modules_to_save] == both
    whole = Judged(frozen=True).requires_grad_(False)
    assert [saved.name for saved in ll.plan(whole, ll.LoRAConfig(r=2)).modules_to_save] == both


@pytest.mark.parametrize(("excluded", "left"), [(["judge"], True), ("judge", True), (["head"], False), (None, False)])
def test_heads_in_what_is_excluded_are_left_alone(excluded, left):
    """A head that is named itself gets no adapter, which it would not have, and is trained in full."""
    found = ll.plan(Judged(frozen=False), ll.LoRAConfig(r=2, exclude_modules=excluded))
    assert ("judge.head" in [saved.name for saved in found.modules_to_save]) != left
    assert any("judge.head is not trained (in what exclude_modules names)" in note for note in found.notes) == left
    assert any(target.name.startswith("judge.") for target in found.targets) != (left or excluded == ["judge"])
    named = ll.plan(Judged(frozen=True), ll.LoRAConfig(r=2, exclude_modules=excluded, modules_to_save=["judge.head"]))
    assert [saved.name for saved in named.modules_to_save] == ["judge.head"]


class Weighted(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.log_vars, self.more = nn.Parameter(torch.zeros(2)), nn.ParameterList([nn.Parameter(torch.zeros(2))])


def test_parameters_of_the_module_itself_are_not_frozen_without_a_word():
    model = Weighted()
    with pytest.warns(UserWarning, match=r"log_vars, more.0: of the LightningModule itself, and not trained: name it"):
        ll.inject(model, ll.LoRAConfig(r=2))
    named = ll.LoRAConfig(r=2, modules_to_save=["head", "log_vars", "more"])
    assert not ll.plan(Weighted(), named).notes
    model.log_vars.requires_grad_(False)
    assert not ll.plan(Weighted().net, ll.LoRAConfig(r=2)).notes


def test_routers_are_left_alone():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.shared_expert_gate = nn.Linear(8, 4), nn.Linear(8, 1)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.routing = Router(8, 4)

    plan = ll.plan(MoE(), ll.LoRAConfig())
    assert [t.name for t in plan.targets] == [f"experts.{i}" for i in range(4)]
    assert plan.skipped == dict.fromkeys(["gate", "shared_expert_gate", "routing"], "MoE router")
    (named,) = ll.plan(MoE(), ll.LoRAConfig(target_modules=["gate"])).targets
    assert named.name == "gate"  # never, unless it is named
    mixtral, gate = FAMILIES["mixtral"].make(), "model.layers.0.mlp.gate"
    assert not any("gate" in t.name for t in ll.plan(mixtral, ll.LoRAConfig()).targets)
    with pytest.raises(ll.TargetError, match=rf"What it reads can be: target_parameters=\['{gate}.weight'\]"):
        ll.plan(mixtral, ll.LoRAConfig(target_modules=[gate]))
    assert f"{gate}.weight" in {
        t.name for t in ll.plan(mixtral, ll.LoRAConfig(target_parameters=[f"{gate}.weight"])).targets
    }


def test_llama4_does_not_crash():
    config = tf.Llama4TextConfig(
        **{**DECODER, **KV}, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=2, head_dim=8
    )
    plan = ll.plan(tf.Llama4ForCausalLM(config), ll.LoRAConfig())
    assert not any("router" in t.name for t in plan.targets)
    assert any("shared_expert" in t.name for t in plan.targets)


def test_a_base_models_own_head_is_its_pooler():
    config = tf.SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)
    assert saved(tf.SiglipVisionModel(config)) == []
    assert "head.mlp.fc1" in names(tf.SiglipVisionModel(config))

    class Own(tf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert, self.tagger = tf.BertModel(config), nn.Linear(32, 3)

    assert saved(Own(tf.BertConfig(**DECODER))) == ["tagger"]


def test_large_custom_embeddings_cost_nothing(monkeypatch):
    """Gemma's embedding is a subclass with half a billion weights: the plan must not make random ones to try it."""
    with torch.device("meta"):
        model = tf.GemmaForCausalLM(tf.GemmaConfig())
    monkeypatch.setattr(torch, "randn", None)
    assert len(names(model)) == 196


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_scripted_parts_are_left_alone():
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "scripted": torch.jit.script(nn.Linear(4, 4))})
    ll.inject(model, ll.LoRAConfig(r=2))
    assert list(ll.adapter_state_dict(model)) == ["plain.lora.default.A", "plain.lora.default.B"]
    assert not model["scripted"].weight.requires_grad
    model["scripted"](model["plain"](torch.ones(1, 4)))
    ll.eject(model)
    assert model["scripted"].weight.requires_grad


def test_compiled_models_have_their_usual_names():
    plain, compiled = Wrapped(FAMILIES["bert"].make), Wrapped(FAMILIES["bert"].make)
    compiled.net = torch.compile(compiled.net, backend="eager")
    assert ll.plan(compiled, ll.LoRAConfig()) == ll.plan(plain, ll.LoRAConfig())
    compiled.net._orig_mod.bert = torch.compile(compiled.net._orig_mod.bert, backend="eager")
    assert ll.plan(compiled, ll.LoRAConfig()) == ll.plan(plain, ll.LoRAConfig())


def test_mamba_can_be_planned():
    config = tf.MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=2)
    found = names(tf.MambaForCausalLM(config))
    assert {n.partition("mixer.")[2] for n in found} == {"in_proj", "x_proj", "out_proj", "dt_proj.weight"}


# ---- layers that can't have an adapter ---------------------------------------------------------------------------------


class TupleLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input), self.bias


class SquaredWeight(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight**2, self.bias)


def test_custom_linears():
    from tests.helpers.layers import OwnProductLinear, ScaledLinear

    model = nn.ModuleDict(
        {"a": ScaledLinear(8, 8), "b": OwnProductLinear(8, 8), "c": TupleLinear(8, 8), "d": SquaredWeight(8, 8)}
    )
    plan = ll.plan(model, ll.LoRAConfig())
    assert [t.name for t in plan.targets] == ["a", "b"]
    assert plan.skipped["c"] == "TupleLinear.forward returns tuple, not a tensor"
    assert plan.skipped["d"] == "SquaredWeight.forward with an adapter would not be its forward with the merged weight"
    with pytest.raises(ll.TargetError, match="c: TupleLinear.forward returns tuple"):
        ll.plan(model, ll.LoRAConfig(target_modules=["c"]))


class Fixed(nn.Embedding):
    """As the positions of Marian: what it is given is a shape."""

    @torch.no_grad()
    def forward(self, shape):
        return super().forward(torch.arange(shape[1]))


class FixedInside(nn.Linear):
    def forward(self, input):
        with torch.no_grad():
            return super().forward(input)


def test_layers_without_gradients():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Fixed(8, 8), "c": FixedInside(8, 8)})
    assert ll.plan(model, ll.LoRAConfig()).skipped == {
        "c": "FixedInside.forward runs without gradients: an adapter would be dead"
    }
    with pytest.raises(ll.TargetError, match="b: Fixed.forward runs without gradients"):
        ll.plan(model, ll.LoRAConfig(target_modules=["a", "b"]))


class OnlyInTraining(nn.Linear):
    """Calls ``super().forward`` in train mode alone: an adapter below it would be lost in eval mode."""

    def forward(self, input):
        return super().forward(input) if self.training else nn.functional.linear(input, self.weight, self.bias)


class TwiceTheBias(nn.Linear):
    """Linear in its weight, which is enough for LoRA and not for DoRA."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight, 2 * self.bias)


class PreNorm(nn.Linear):
    """Not linear in its input, which an adapter sees as it comes."""

    def forward(self, input):
        return nn.functional.linear(nn.functional.layer_norm(input, input.shape[-1:]), self.weight, self.bias)


class Clamped(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input.clamp(-4, 4), self.weight, self.bias)


class WeightScaled(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("layer", [PreNorm, Clamped, WeightScaled])
def test_the_verdict_does_not_depend_on_chance(layer, use_dora):
    """Nor do, therefore, the targets of ranks and of runs with other seeds."""
    model = nn.Sequential(layer(16, 16), nn.Linear(16, 16))
    for seed in range(10):
        torch.manual_seed(seed)
        assert names(model, use_dora=use_dora) == ["1"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_heads_and_complex_parameters():
    bert = FAMILIES["bert"].make().base_model
    with pytest.raises(ll.TargetError, match="modules_to_save: head .LazyLinear. is a lazy layer without a shape"):
        ll.plan(nn.ModuleDict({"bert": bert, "head": nn.LazyLinear(4)}), ll.LoRAConfig())
    model = nn.ModuleDict({"bert": bert})
    model.register_parameter("phase", nn.Parameter(torch.randn(4, dtype=torch.complex64)))
    assert [m.name for m in ll.plan(model, ll.LoRAConfig()).modules_to_save] == ["phase"]


class WantsMore(nn.Linear):
    def forward(self, input, scale):
        return nn.functional.linear(input, self.weight, self.bias) * scale


class Asserts(nn.Linear):
    def forward(self, input):
        assert input.shape[0] == 3, "three of them"
        return super().forward(input)


def test_custom_forwards_are_tried_in_both_modes_and_for_the_variant():
    model = nn.ModuleDict({"a": OnlyInTraining(8, 8), "b": TwiceTheBias(8, 8), "c": nn.Linear(8, 8)})
    assert [t.name for t in ll.plan(model, ll.LoRAConfig()).targets] == ["b", "c"]
    assert [t.name for t in ll.plan(model, ll.LoRAConfig(use_dora=True)).targets] == ["c"]


@pytest.mark.parametrize(("layer", "error"), [(WantsMore, "TypeError.*'scale'"), (Asserts, "AssertionError: three")])
def test_forwards_that_cannot_be_tried_are_adapted_only_if_named(layer, error):
    model = nn.ModuleDict({"a": layer(8, 8), "b": nn.Linear(8, 8)})
    plan = ll.plan(model, ll.LoRAConfig())
    assert [t.name for t in plan.targets] == ["b"]
    assert re.search(f"could not be tried on a small tensor .{error}.*name it in target_modules", plan.skipped["a"])
    named = ll.plan(model, ll.LoRAConfig(target_modules=["a"]))
    assert [t.name for t in named.targets] == ["a"]
    assert "It was named, and gets an adapter" in named.notes[0]


@pytest.mark.filterwarnings("ignore:.*It was named")
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_arguments_reach_the_layer(monkeypatch, use_dora):
    """Also the second base product of DoRA with dropout."""
    monkeypatch.setattr("lightning_lora.layers.base.dropout", torch.dropout)
    model = nn.Sequential(WantsMore(8, 8, bias=False))
    ll.inject(
        model, ll.LoRAConfig(r=2, target_modules=["0"], use_dora=use_dora, lora_dropout=0.5, modules_to_save=None)
    )
    adapter, x = model[0].lora["default"], torch.randn(4, 8)
    nn.init.normal_(adapter.B)
    model.train()
    torch.manual_seed(0)
    out = model[0](x, 3.0)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    W = model[0].weight
    norms = (W + adapter.scaling * adapter.B @ adapter.A).norm(dim=1)
    gain = adapter.magnitude / norms if use_dora else torch.ones(8)
    base = 3 * x @ model[0].weight.T + (gain - 1) * (3 * dropped @ model[0].weight.T)
    torch.testing.assert_close(out, base + gain * adapter.scaling * (dropped @ adapter.A.T @ adapter.B.T))


def test_probing_leaves_no_trace():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.register_buffer("calls", torch.zeros(()))
            self.drop = nn.Dropout(0.5)

        def forward(self, input):
            self.calls += 1
            return super().forward(self.drop(input))

    model = nn.Sequential(Counts(), nn.Linear(8, 8)).train()
    before, random = copy.deepcopy(vars(model[0])), torch.get_rng_state()
    assert "0" in [t.name for t in ll.plan(model, ll.LoRAConfig()).targets]
    assert model[0].calls == 0
    assert model[0].drop.training
    assert vars(model[0]).keys() == before.keys()
    assert torch.equal(torch.get_rng_state(), random)


def test_roles_do_not_depend_on_adapters_that_are_there():
    """A frozen part beside a transformers model stays frozen and a new one new, whatever was injected before."""
    bert = FAMILIES["bert"].make().base_model

    def build():
        model = nn.ModuleDict({"bert": copy.deepcopy(bert), "old": nn.Linear(8, 8), "new": nn.Linear(8, 8)})
        model["old"].requires_grad_(False)
        return model

    alone, behind = build(), build()
    ll.inject(behind, ll.LoRAConfig(target_modules=["query"], modules_to_save=None), "first")
    expected = ll.plan(alone, ll.LoRAConfig())
    assert [m.name for m in expected.modules_to_save] == ["new"]
    assert ll.plan(behind, ll.LoRAConfig()) == expected
    ll.inject(behind, ll.LoRAConfig(), "second")
    assert ll.plan(behind, ll.LoRAConfig()) == expected


def test_weights_that_are_read_and_not_called():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plan = ll.plan(layer, ll.LoRAConfig())
    reads = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    assert [t.name for t in plan.targets] == [*reads, "linear1", "linear2"]
    assert [t.name for t in ll.plan(layer, ll.LoRAConfig(target_modules="attention")).targets] == reads
    assert [t.name for t in ll.plan(layer, ll.LoRAConfig(target_modules=["self_attn"])).targets] == reads
    assert [t.name for t in ll.plan(layer, ll.LoRAConfig(target_modules=["out_proj"])).targets] == reads[1:]


def test_forward_that_was_replaced_on_the_instance():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = model[0].forward
    assert "replaced on the instance" in ll.plan(model, ll.LoRAConfig()).skipped["0"]


def test_hooks_of_accelerate():
    model = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ll.TargetError, match=r"accelerate's hooks.*load the base without device_map"):
        ll.inject(model, ll.LoRAConfig())


def test_parametrized_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert "parametrization" in ll.plan(model, ll.LoRAConfig()).skipped["0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyLinear(4), "lazy layer"),
        (lambda: _with_weight(torch.zeros(4, 4, dtype=torch.int8)), "integer weight"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "complex weight"),
        (lambda: _with_weight(torch.eye(4).to_sparse()), "sparse weight"),
        (lambda: _with_weight(torch.zeros(6, 4)), "has a weight of 6 rows and says out_features=4: set"),
    ],
    ids=["lazy", "integer", "complex", "sparse", "rows"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:Complex modules are a new feature")
def test_weights_that_cannot_be_adapted(make, message):
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ll.TargetError, match=message):
        ll.plan(model, ll.LoRAConfig())
    assert [t.name for t in ll.plan(model, ll.LoRAConfig(exclude_modules=["1"])).targets] == ["0"]


def _with_weight(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_peft_model_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ll.TargetError, match="already has PEFT adapters"):
        ll.plan(Wrapped(lambda: model), ll.LoRAConfig())


def test_shared_modules_are_planned_once_and_known_by_all_names():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.decoder = self.encoder

    (first, _) = ll.plan(Shared(), ll.LoRAConfig()).targets
    assert (first.name, first.aliases) == ("encoder.0", ("decoder.0",))
    assert names(Shared(), target_modules=["decoder.1"]) == ["encoder.1"]
    model = Shared()
    ll.inject(model, ll.LoRAConfig())
    assert model.decoder[0] is model.encoder[0]
    assert len(ll.adapter_state_dict(model)) == 4
    assert ll.summary(model).trainable == 4 * 8 * 8


def test_rank_above_the_layers_is_a_warning():
    plan = ll.plan(Plain(), ll.LoRAConfig(r=12, target_modules=["q"]))
    assert "r=12 is more than the rank that a 8x8 weight can have" in plan.notes[0]
    with pytest.warns(UserWarning, match="more than the rank"):
        ll.inject(Plain(), ll.LoRAConfig(r=12, target_modules=["blocks.0.attn.q"]))


def test_the_table():
    text = str(ll.plan(FAMILIES["bert"].make(), ll.LoRAConfig(r=4, rank_pattern={"pooler.dense": 2})))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["layer", "type", "shape", "rank", "parameters", "remark"]
    assert [
        "bert.encoder.layer.{0-1}.attention.self.query",
        "(2x)",
        "Linear",
        "32x32",
        "4",
        "512",
        "alpha",
        "16",
    ] in lines
    assert ["bert.pooler.dense", "Linear", "32x32", "2", "128", "alpha", "16"] in lines
    assert any(line[:3] == ["classifier", "Linear", "99"] and "full:" in line for line in lines)
    assert lines[-1] == ["total", "6,499", "trainable"] or lines[-1][0] == "total"
    assert "skipped: output embedding" in str(ll.plan(llama(), ll.LoRAConfig()))


class Classified(nn.Module):
    """As timm's models are, which say what their classifier is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.conv_head = nn.Linear(8, 8), nn.Conv2d(8, 8, 1)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 3)})

    def get_classifier(self) -> nn.Module:
        return self.head["fc"]


def test_where_a_model_says_its_classifier_nothing_else_is_a_head():
    model = nn.ModuleDict({"net": Classified(), "head": nn.Linear(3, 2)})
    plan = ll.plan(model, ll.LoRAConfig())
    assert {saved.name for saved in plan.modules_to_save} == {"net.head.fc", "head"}
    assert [target.name for target in plan.targets] == ["net.body"]


def test_a_predictor_is_what_is_new_of_a_detector():
    """The names are those of torchvision's Faster R-CNN, whose heads are pretrained."""
    boxes = {
        "box_head": nn.ModuleDict({"fc6": nn.Linear(8, 8)}),
        "box_predictor": nn.ModuleDict({"s": nn.Linear(8, 3)}),
    }
    detector = nn.ModuleDict({"rpn": nn.ModuleDict({"head": nn.Conv2d(3, 3, 1)}), "roi_heads": nn.ModuleDict(boxes)})
    plan = ll.plan(detector, ll.LoRAConfig())
    assert [saved.name for saved in plan.modules_to_save] == ["roi_heads.box_predictor"]
    assert [target.name for target in plan.targets] == ["roi_heads.box_head.fc6"]
    speech = nn.ModuleDict({"body": nn.Linear(8, 8), "duration_predictor": nn.Linear(8, 3)})
    assert not ll.plan(speech, ll.LoRAConfig()).modules_to_save, "it may be a pretrained part"


def test_a_module_that_only_holds_layers_says_how_they_are_named():
    model = nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "out": nn.Linear(8, 2)}
    )
    with pytest.raises(ll.TargetError, match=r"no layer type.*'backbone[.]\*' names the 2 layers in it"):
        ll.plan(model, ll.LoRAConfig(target_modules=["backbone"]))
    assert len(ll.plan(model, ll.LoRAConfig(target_modules=["backbone.*"])).targets) == 2


def test_a_head_that_no_forward_calls_gets_no_adapter():
    """ESM's contact_head is for predict_contacts alone: an adapter on it would be dead."""
    config = tf.EsmConfig(**SMALL, vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary")
    for cls, outer in ((tf.EsmForMaskedLM, "esm."), (tf.EsmForSequenceClassification, "esm."), (tf.EsmModel, "")):
        plan = ll.plan(cls(config), ll.LoRAConfig(r=2))
        assert plan.skipped[f"{outer}contact_head.regression"] == "EsmModel.forward never calls it"
        assert any(target.name.endswith("query") for target in plan.targets)
    named = ll.LoRAConfig(r=2, target_modules=["regression"])
    assert [target.name for target in ll.plan(tf.EsmModel(config), named).targets] == ["contact_head.regression"]


def mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("mixtral", {"target_modules": ["attention", "mlp"]}, r"target_modules: 'mlp' .*target_parameters='experts'"),
        ("mixtral", {"exclude_modules": "mlp"}, "exclude_modules: 'mlp' matches no linear layer here: leave it out"),
        ("mamba", {"exclude_modules": ["attention"]}, "exclude_modules: 'attention' matches no linear layer here"),
        ("mamba", {"target_modules": ["attention", "in_proj"]}, "target_modules: 'attention' matches no linear layer"),
    ],
)
def test_words_that_mean_no_layer(family, options, said):
    """Beside others they would do nothing, and nothing would say so."""
    made = mamba if family == "mamba" else FAMILIES[family].make
    with pytest.raises(ll.TargetError, match=said):
        ll.plan(made(), ll.LoRAConfig(**options))


def test_a_rank_for_layers_that_have_no_adapters_beside_rows_of_tokens():
    config = ll.LoRAConfig(target_modules=[], trainable_token_indices=[5], rank_pattern={"nothing": 4})
    with pytest.raises(ll.TargetError, match="rank_pattern: 'nothing' matches nothing"):
        ll.plan(FAMILIES["llama"].make(), config)


def of_library(module: str, name: str = "Model", bases: tuple[type, ...] = (nn.Module,)) -> type:
    return type(name, bases, {"__module__": module})


class Diffuser(of_library("diffusers.models.modeling_utils", "ModelMixin")):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)


class Timm(of_library("timm.models.vision")):
    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {}
        self.qkv, self.top = nn.Linear(8, 24), nn.Linear(24, 3)

    def get_classifier(self):
        return self.top


Timm.__module__ = "timm.models.vision"


def test_models_of_other_libraries_beside_one_of_transformers_are_backbones():
    """Of diffusers and timm, told by their classes: all they have was pretrained but a classifier."""

    def build() -> nn.Module:
        net = nn.Module()
        net.text, net.unet, net.eye, net.new = FAMILIES["bert"].make().bert, Diffuser(), Timm(), nn.Linear(8, 8)
        return net

    def told(net: nn.Module) -> tuple[set[str], list[str]]:
        made = ll.plan(net, ll.LoRAConfig(r=2))
        return {t.name.split(".")[0] for t in made.targets}, sorted(saved.name for saved in made.modules_to_save)

    net = build()
    assert told(net) == ({"text", "unet", "eye"}, ["eye.top", "new"])
    net.unet.requires_grad_(False)  # one that is to stay as it is, beside others that are not
    assert told(net) == ({"text", "eye"}, ["eye.top", "new"])
    net.requires_grad_(False)  # as scripts freeze everything before adapters are added
    assert told(net)[0] == {"text", "unet", "eye"}


@pytest.mark.parametrize(("bias", "where"), [("all", "module"), ("lora_only", "adapted layer")])
def test_biases_that_are_not_there_are_noted(bias, where):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    note = f"bias='{bias}' trains nothing: no {where} has a bias that is not trained already"
    assert ll.plan(model, ll.LoRAConfig(r=2, bias=bias)).notes == (note,)
    model[0] = nn.Linear(8, 8)
    assert not ll.plan(model, ll.LoRAConfig(r=2, bias=bias)).notes


def test_a_bias_of_integers_is_left_alone():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(8, dtype=torch.long), requires_grad=False)

    model = nn.Sequential(nn.Linear(8, 8), Shifted())
    plan = ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"], bias="all", modules_to_save=None))
    assert [saved.name for saved in plan.modules_to_save] == ["0.bias"]


def test_a_parameter_in_what_is_trained_in_full_has_no_adapter():
    options = {"target_modules": ["q_proj"], "target_parameters": "experts", "modules_to_save": ["experts"]}
    with pytest.raises(ll.TargetError, match=r"target_parameters: .*experts\..* is trained in full: choose one"):
        ll.inject(FAMILIES["mixtral"].make(), ll.LoRAConfig(**options))


def test_patterns_that_decide_nothing_are_noted():
    """The first one that matches a layer counts."""
    config = ll.LoRAConfig(rank_pattern={"attn": 2, "q": 4}, alpha_pattern={"blocks": 2, "blocks.1": 4, "blocks.2": 5})
    ranks, alphas = (note for note in ll.plan(Plain(), config).notes if "nothing is decided by" in note)
    assert ranks == (
        "rank_pattern: nothing is decided by q: of the patterns that match a layer the first one counts, and others "
        "stand before"
    )
    assert alphas.startswith("alpha_pattern: nothing is decided by blocks.1, blocks.2: ")
    config = ll.LoRAConfig(rank_pattern={"q": 4, "attn": 2}, alpha_pattern={"blocks.1": 4, "blocks": 2})
    assert not any("nothing is decided by" in note for note in ll.plan(Plain(), config).notes)
