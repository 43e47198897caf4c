"""PEFT folders of adapters on parameters that are read: experts, attention that holds its projections, others."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.analysis import analyze_files
from lightning_lora.files.combine import combine_files
from lightning_lora.files.inspection import inspect
from lightning_lora.files.merge import merge_files
from lightning_lora.layers import lora_layers
from tests.commands.files import assert_same_tensors
from tests.layers.test_experts import FAMILIES, IDS, LORA, noise

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's use
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),  # they do
]

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "llama4"]


def build(family):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_there_and_back(family, tmp_path):
    model = build(family)
    ll.inject(
        model,
        ll.LoRAConfig(**LORA, lora_dropout=0.1, target_modules=["q_b_proj"] if family == "deepseek_v3" else ["q_proj"]),
    )
    noise(model)
    with torch.no_grad():
        expected, base = model(IDS).logits, build(family)(IDS).logits
    assert (expected - base).abs().max() > 1e-3
    ll.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = build(family)
        ll.load_adapter(again, tmp_path / folder)
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        ll.save_adapter(again, tmp_path / f"{folder}-again", "default")
        first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", f"{folder}-again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert ll.adapters(again)["default"].target_parameters is not None
    own = build(family)
    ll.load_adapter(own, tmp_path / "ours")
    assert ll.adapters(own)["default"].lora_dropout == 0.1


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "llama4"])
def test_experts_that_started_with_a_part_of_the_weight(family, tmp_path):
    """Each matrix of a stack has twice the rank in a folder, which is taken apart again."""
    model = build(family)
    model.save_pretrained(tmp_path / "base")
    start = {**LORA, "init_lora_weights": "pissa", "rank_pattern": {"down_proj": 3}}
    ll.inject(model, ll.LoRAConfig(**start, target_modules=["q_proj"]))
    noise(model)
    ll.save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        expected = model(IDS).logits
        theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "a").eval()
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    again = build(family)
    ll.load_adapter(again, tmp_path / "a")
    state, loaded = ll.adapter_state_dict(model), ll.adapter_state_dict(again)
    assert state.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items()), "the first factors too"
    found, expected = analyze_files(tmp_path / "a"), ll.analyze(model)
    norms = {each["name"]: each["norm_update"] for each in inspect(tmp_path / "a")["adapters"][0]["layers"]}
    for name, layer in expected.layers.items():
        assert found.layers[name].singular_values == pytest.approx(layer.singular_values, rel=1e-4)
        if "[" not in name:
            assert norms[name] == pytest.approx(layer.norm, rel=1e-4)
    merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    ll.merge_and_unload(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_ranks_of_their_own(tmp_path):
    model = build("mixtral")
    patterns = {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"down_proj": 5.0}}
    ll.inject(model, ll.LoRAConfig(**LORA, **patterns, target_modules=["q_proj"]))
    noise(model)
    ll.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path / "a").eval()
    again = build("mixtral")
    ll.load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_written_by_peft_from_scratch(tmp_path):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = peft.get_peft_model(build("qwen3_moe"), config).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    model = build("qwen3_moe")
    ll.load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "sizes"), [("granitemoe", {}), ("granitemoe", {"intermediate_size": 16}), ("llama4", {})]
)
def test_stacks_of_older_versions_of_peft(family, sizes, tmp_path):
    """0.18 took every stack as (n, in, out): also (4, 32, 32), where only the version tells it."""

    def build():
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.update({**sizes, "_experts_implementation": "eager"})
        return transformers.AutoModelForCausalLM.from_config(config).double().eval()

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    theirs = peft.get_peft_model(build(), config, autocast_adapter_dtype=False).eval()
    noise(theirs)
    with torch.no_grad():
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    for key in [key for key in held if "experts.lora_A" in key]:  # A (n r, in) and B (out, r n), and the other way
        A, B = held[key], held[key.replace("lora_A", "lora_B")]
        held[key] = B.view(len(B), 2, 4).permute(2, 1, 0).flatten(0, 1).contiguous()
        held[key.replace("lora_A", "lora_B")] = A.view(4, 2, -1).permute(2, 1, 0).flatten(1).contiguous()
    save_file(held, tmp_path / "adapter_model.safetensors")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "peft_version": "0.18.1"}))
    model = build()
    ll.load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ll.UnsupportedError, match="only the base tells which module has them"):
        combine_files(tmp_path / "out", [(tmp_path, 1.0)])


def test_a_checkpoint_is_exported_in_the_same_bytes(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
    from tests.helpers.modules import Wrapped, one_batch, trainer

    module = Wrapped(lambda: build("mixtral"))
    patterns = {"rank_pattern": {"*q_proj": 3}}  # no regular expression, as PEFT's are
    lora = ll.LoRA(**LORA, **patterns, target_modules=["q_proj"], save_peft=True)
    trainer(lora, ModelCheckpoint(tmp_path, filename="last")).fit(
        module, one_batch({"input_ids": IDS, "labels": IDS}, 3)
    )
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "exported")
    ll.save_adapter(module, tmp_path / "saved")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("exported", "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("exported", "saved")]
    assert configs[0] == configs[1]
    found, expected = analyze_files(tmp_path / "last.ckpt").layers, ll.analyze(module).layers
    assert found.keys() == expected.keys()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.cell = nn.GRUCell(16, 16)
        self.linear = nn.Linear(16, 4)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        return self.linear(self.cell(x[:, 0], x[:, 1]))


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))


def test_attention_and_parameters_of_other_modules(tmp_path):
    model = Net()
    options = {"target_modules": ["in_proj_weight", "linear"], "modules_to_save": None}
    ll.inject(
        model, ll.LoRAConfig(r=2, lora_alpha=3.0, target_parameters=["cell.weight_ih", "cell.weight_hh"], **options)
    )
    noise(model)
    expected = model(X)
    ll.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "a")
    torch.testing.assert_close(theirs(X).detach(), expected.detach())
    again = Net()
    ll.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(X).detach(), expected.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "PEFT has no DoRA on parameters that are read: convert it by ll.to_lora"),
        ({"target_modules": ["out_proj"]}, "attention.out_proj.weight: PEFT adds the update of the output projection"),
    ],
)
def test_what_peft_can_not_have(options, message, tmp_path):
    model = Net()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, modules_to_save=None, **options))
    with pytest.raises(ll.UnsupportedError, match=message):
        ll.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.softmax((x @ self.q) @ (x @ self.k).mT, -1) @ x)


def test_layers_within_a_module_that_peft_wraps(tmp_path):
    """It calls them otherwise then, and would leave them empty with no more than a warning."""
    model = nn.Sequential(Projected(), nn.Linear(8, 8))
    config = {"r": 2, "lora_alpha": 3, "target_parameters": ["0.q", "0.k"]}
    ll.inject(model, ll.LoRAConfig(**config))
    noise(model)
    with pytest.raises(ll.UnsupportedError, match=r"0.out: within 0, which PEFT wraps .* merge it"):
        ll.save_adapter(model, tmp_path / "a")
    ll.delete_adapter(model, "default")
    ll.inject(model, ll.LoRAConfig(**config, target_modules=["1"]))
    noise(model)
    ll.save_adapter(model, tmp_path / "a")
    x = torch.randn(2, 3, 8)
    expected = model(x)
    ll.delete_adapter(model, "default")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "a")(x), expected)


def test_an_attention_that_peft_adapted_is_refused(tmp_path):
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attention"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ll.UnsupportedError, match="attention: PEFT adds the update of the output projection .* twice"):
        ll.load_adapter(Net(), tmp_path)


def wavlm():
    """Its attention reads the weights of its projections, and never calls them."""
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, conv_dim=(16,),
        conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return transformers.WavLMModel(config).eval()


SOUND = torch.randn(2, 200, generator=torch.Generator().manual_seed(3))


def test_layers_that_are_read_are_no_layers_to_peft(tmp_path):
    model = wavlm()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q_proj", "output_dense"]))
    with pytest.raises(
        ll.UnsupportedError, match=r"q_proj.weight: the layer is never called, and in PEFT .* nothing: keep it"
    ):
        ll.save_adapter(model, tmp_path / "ours")

    theirs = peft.get_peft_model(wavlm(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "output_dense"]))
    noise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = wavlm()
    with pytest.warns(UserWarning, match=r"q_proj: the layer is never called, .* does nothing: left out"):
        ll.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        out = again(SOUND).last_hidden_state
        torch.testing.assert_close(out, theirs(SOUND).last_hidden_state)
        assert (out - wavlm()(SOUND).last_hidden_state).abs().max() > 1e-3
    wavlm().save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    with torch.no_grad():
        merged = transformers.WavLMModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(SOUND).last_hidden_state, out, rtol=1e-4, atol=1e-5)

    theirs = peft.get_peft_model(wavlm(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "nothing")
    with pytest.raises(ll.CheckpointError, match="has nothing else: .*q_proj: the layer is never called"):
        ll.load_adapter(wavlm(), tmp_path / "nothing")


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_the_table_that_others_are_tied_to(tmp_path):
    """T5's ``shared`` is no layer that is called: an adapter on it is refused here, and does nothing in PEFT."""
    for targets in (["shared"], ["shared", "q"]):
        with pytest.raises(
            ll.TargetError,
            match=r"'shared' matches nothing .*T5ForConditionalGeneration never calls it: .*"
            r"name encoder.embed_tokens, decoder.embed_tokens, which",
        ):
            ll.plan(t5(), ll.LoRAConfig(target_modules=targets))
    theirs = peft.get_peft_model(t5(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["shared", "q"]))
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    model = t5()
    with pytest.warns(UserWarning, match="shared: the layer is never called, .* does nothing: left out"):
        ll.load_adapter(model, tmp_path)
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits)
        model = t5()
        plan = ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"], trainable_token_indices=[3]))
        assert [target.name for target in plan.targets if target.tokens] == [
            "shared",
            "encoder.embed_tokens",
            "decoder.embed_tokens",
            "lm_head",
        ]


def test_inspect_tells_the_norms_of_experts(tmp_path):
    model = build("mixtral")
    ll.inject(model, ll.LoRAConfig(**LORA, target_modules=[]))
    noise(model)
    ll.save_adapter(model, tmp_path / "a")
    adapter = next(m for n, m in model.named_modules() if n.endswith("gate_up_proj.lora.default"))
    expected = (1.5 * adapter.B @ adapter.A).norm().item()
    norms = [layer["norm_update"] for layer in inspect(tmp_path / "a")["adapters"][0]["layers"]]
    assert any(norm == pytest.approx(expected, rel=1e-4) for norm in norms)


# ---- files alone --------------------------------------------------------------------------------------------------------

FILES = {
    "gpt_oss": {},  # stored as (in, out)
    "llama4": {"target_modules": ["q_proj"]},  # ... and not said to be
    "granitemoe": {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"down_proj": 5.0}},
    "mixtral": {"target_parameters": ["re:.*mlp.gate.weight"]},  # routers are matrices
}


def saved(folder, family, seed=0, **options):
    """A base and an adapter of it in files, and the model with it in memory."""
    model = build(family)
    model.save_pretrained(folder / "base")
    ll.inject(model, ll.LoRAConfig(**{**LORA, "target_modules": [], **options}))
    torch.manual_seed(seed)
    noise(model)
    ll.save_adapter(model, folder / f"a{seed}")
    return model


@pytest.mark.parametrize("family", FILES)
def test_merged_into_files(family, tmp_path):
    model = saved(tmp_path, family, **{"target_modules": ["q_proj"], **FILES[family]})
    peft.PeftModel.from_pretrained(build(family), tmp_path / "a0").save_pretrained(tmp_path / "theirs")
    merge_files(tmp_path / "base", tmp_path / "a0", tmp_path / "out")
    merge_files(tmp_path / "base", tmp_path / "theirs", tmp_path / "of-theirs")
    assert_same_tensors(tmp_path / "out", tmp_path / "of-theirs")
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    ll.merge_and_unload(model)
    assert any(
        not torch.equal(p, build(family).get_parameter(n)) for n, p in merged.named_parameters() if "q_" not in n
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FILES)
def test_analysed_with_a_base_in_files(family, tmp_path):
    model = saved(tmp_path, family, **{"target_modules": ["q_proj"], **FILES[family]})
    found, expected = analyze_files(tmp_path / "a0", tmp_path / "base"), ll.analyze(model)
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert found.layers[name].singular_values == pytest.approx(layer.singular_values, rel=1e-5)
        assert found.layers[name].weight.drift == pytest.approx(layer.weight.drift, rel=1e-5)


@pytest.mark.parametrize("family", FILES)
def test_analysed_alone(family, tmp_path):
    """By the model's names, and with ranks and alphas that go by them."""
    model = saved(tmp_path, family, **{"target_modules": ["q_proj"], **FILES[family]})
    found, expected = analyze_files(tmp_path / "a0"), ll.analyze(model)
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert found.layers[name].singular_values == pytest.approx(layer.singular_values, rel=1e-5)
    assert not found.notes
    adapters = {name: layer.lora["default"] for name, layer in lora_layers(model)}
    told = inspect(tmp_path / "a0")["adapters"][0]["layers"]
    assert {each["name"]: each["r"] for each in told} == {name: adapter.r for name, adapter in adapters.items()}
    for each in told:
        update = adapters[each["name"]].scaling * adapters[each["name"]].B @ adapters[each["name"]].A
        assert each["norm_update"] == pytest.approx(update.norm().item(), rel=1e-4)
    if family != "llama4":  # whose folders have PEFT's A and B
        assert ll.analyze(model, compare=tmp_path / "a0").comparison.layers.keys() == expected.layers.keys()


def test_what_peft_wrote_of_experts_is_named_as_far_as_its_folder_tells(tmp_path):
    ends = ["experts.gate_up_proj", "experts.down_proj"]
    folders = {"one": (ends[1:], {}), "two": (ends, {}), "ranks": (ends, {"gate_up_proj": 4})}
    for name, (wanted, ranks) in folders.items():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=wanted, rank_pattern=ranks)
        peft.get_peft_model(build("granitemoe"), config).save_pretrained(tmp_path / name)
    experts = {name.partition(".experts")[2] for name in analyze_files(tmp_path / "one").layers}
    assert experts == {"", *(f".down_proj[{i}]" for i in range(4))}
    found = analyze_files(tmp_path / "two")
    assert {name.partition(".experts")[2] for name in found.layers if name.endswith("[0]")} == {"[0]", ".base_layer[0]"}
    assert any("names of PEFT, whose parameters only the base tells" in note for note in found.notes)
    for read in (analyze_files, inspect):
        with pytest.raises(ll.UnsupportedError, match="an adapter on down_proj or gate_up_proj, whose ranks .* differ"):
            read(tmp_path / "ranks")
    build("granitemoe").save_pretrained(tmp_path / "base")
    named = analyze_files(tmp_path / "ranks", tmp_path / "base").layers
    assert {layer.r for name, layer in named.items() if ".gate_up_proj[" in name} == {4}


def test_files_that_hold_experts_one_by_one(tmp_path):
    saved(tmp_path, "mixtral")
    missed = pytest.raises(ll.CheckpointError, match=r"experts.gate_up_proj.*no such tensor .* makes it of several")
    with missed:
        merge_files(tmp_path / "base", tmp_path / "a0", tmp_path / "out")
    with missed:
        analyze_files(tmp_path / "a0", tmp_path / "base")


METHODS = {
    "cat": ("cat", None),
    "svd": ("svd", 3),
    "linear": ("linear", None),
    "ties": ("ties", None),
    "dare_linear": ("dare_linear", None),
    "dare_ties": ("dare_ties", None),
    "dare-of-updates": ("dare_linear", 3),
}


@pytest.mark.parametrize(("method", "rank"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FILES)
def test_combined_without_their_base(family, method, rank, tmp_path):
    """The same as on the base, for what tells A from B and what draws at random too."""
    for seed in (0, 1):
        saved(tmp_path, family, seed, **{"target_modules": ["q_proj"], **FILES[family]})
    given = [(tmp_path / "a0", 0.7), (tmp_path / "a1", -0.4)]
    report = combine_files(tmp_path / "out", given, method, rank)
    model = build(family)
    for i, (folder, _) in enumerate(given):
        ll.load_adapter(model, folder, f"a{i}")
    expected = ll.combine_adapters(model, {"a0": 0.7, "a1": -0.4}, "combined", method, rank)
    assert report.layers.keys() == expected.layers.keys()
    again = build(family)
    ll.load_adapter(again, tmp_path / "out")
    for (name, ours), (_, theirs) in zip(lora_layers(model), lora_layers(again), strict=True):
        update = change(ours, "combined")
        assert (change(theirs, "combined") - update).norm() <= 1e-5 * update.norm(), name
        assert {report.layers[name].rank, expected.layers[name].rank} == {ours.lora["combined"].r}


def change(layer, adapter_name):
    W = layer.lora_matrix()
    return layer.lora[adapter_name].merged(W.clone()).detach() - W


def test_what_peft_wrote_of_experts_is_not_combined_without_their_base(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    peft.get_peft_model(build("granitemoe"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ll.UnsupportedError, match=r"experts.down_proj.*only the base tells which module has them"):
        combine_files(tmp_path / "out", [(tmp_path / "theirs", 1.0)])
    saved(tmp_path, "granitemoe")
    combine_files(tmp_path / "out", [(tmp_path / "theirs", 1.0), (tmp_path / "a0", 0.5)])


def test_ranks_of_experts_are_no_scales(tmp_path):
    """Their A is as many ranks high as there are experts."""
    saved(tmp_path, "granitemoe", target_modules=["q_proj"])
    findings = [str(finding) for finding in ll.lint(tmp_path / "a0", "vllm")]
    assert findings == ["vllm: target_parameters (experts) have a layout of their own there: merge the adapter"]
