"""Parts of fused projections: queries, keys, values, gates and ups of layers that give several of them at once."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers as tf
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn

import lightning_lora as ll
from lightning_lora.files.combine import combine_files
from lightning_lora.files.merge import merge_files
from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
from lightning_lora.merging.merge import Originals
from tests.helpers.modules import Wrapped, one_batch, trainer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}


def phi3():
    return tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, **IDS, intermediate_size=48, num_key_value_heads=2))


def neox():
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, **IDS, intermediate_size=48))


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, **IDS))


def falcon(**options):
    return tf.FalconForCausalLM(tf.FalconConfig(**SIZES, **IDS, **options))


def mpt():
    config = tf.MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2)
    config.loss_type = "ForCausalLMLoss"
    return tf.MptForCausalLM(config)


FAMILIES = {
    "phi3": (phi3, "self_attn.qkv_proj"),
    "gpt-neox": (neox, "attention.query_key_value"),
    "bloom": (bloom, "self_attention.query_key_value"),
    "falcon": (lambda: falcon(multi_query=True), "self_attention.query_key_value"),
    "falcon-groups": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        "self_attention.query_key_value",
    ),
    "falcon-heads": (lambda: falcon(multi_query=False, alibi=True), "self_attention.query_key_value"),
    "bigcode": (lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT)), "attn.c_attn"),
    "bigcode-heads": (lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT, multi_query=False)), "attn.c_attn"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)), "attn.c_attn"),
    "mpt": (mpt, "attn.Wqkv"),
}
OPTIONS = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q", "v"],
    "rank_pattern": {"v": 6},
    "alpha_pattern": {"v": 2.0},
    "modules_to_save": None,
}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = FAMILIES[name][0]().to(dtype).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # transformers starts biases at 0
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def ids():
    return torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))


def shake(model, adapter_name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".lora.{adapter_name}." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)


def adapted(name, dtype=torch.float64, **options):
    model = make(name, dtype)
    plan = ll.inject(model, ll.LoRAConfig(**{**OPTIONS, **options}))
    shake(model)
    return model, plan


def attention_of(model, name):
    path = FAMILIES[name][1]
    owner = next(n for n, _ in model.named_modules() if n.endswith(path))
    return model.get_submodule(owner.rpartition(".")[0]), model.get_submodule(owner)


def scaled(name, **factors):
    """The model with parts of its first fused layer, bias included, multiplied: by adapters of full rank."""
    model = make(name)
    _, layer = attention_of(model, name)
    config = ll.LoRAConfig(r=32, lora_alpha=32, target_modules=[*factors], layers_to_transform=0, modules_to_save=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ll.inject(model, config)
    with torch.no_grad():
        for part, factor in factors.items():
            site = layer._lora_weights[part]
            rank = min(site.lora_shape)
            adapter = site.lora["default"]
            U, S, V = torch.linalg.svd(site.lora_matrix(), full_matrices=False)
            adapter.A.zero_()[:rank], adapter.B.zero_()
            adapter.A[:rank], adapter.B[:, :rank] = S[:, None] * V, U * (factor - 1)
            if layer.bias is not None:
                site.lora_layout.of_rows(layer.bias).mul_(factor)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_which_outputs_are_the_queries_keys_and_values(name):
    """Attention is linear in its values, and knows its queries and keys by their products only."""
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def context(model):
        """What the first attention gives to its output projection."""
        attention, fused = attention_of(model, name)
        found = []
        linears = [m for m in attention.modules() if isinstance(m, (nn.Linear, tf.pytorch_utils.Conv1D))]
        (last,) = (m for m in linears if m is not fused)
        with torch.no_grad():
            handle = last.register_forward_pre_hook(lambda module, args: found.append(args[0]))
            model(inputs_embeds=x)
            handle.remove()
        return found[0]

    before = context(make(name))
    torch.testing.assert_close(context(scaled(name, v=3.0)), 3 * before)
    torch.testing.assert_close(context(scaled(name, q=4.0, k=0.25)), before)
    for part in ("q", "k"):
        assert not torch.allclose(context(scaled(name, **{part: 4.0})), before, rtol=1e-3)


@pytest.mark.parametrize("name", ["phi3", "glm", "glm4"])
def test_which_outputs_are_the_gates_and_ups(name):
    def make_one():
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(name, **SIZES, **IDS, intermediate_size=48, num_key_value_heads=2, head_dim=8)
        return tf.AutoModelForCausalLM.from_config(config).double()

    before = make_one().model.layers[0].mlp
    for part, factor in (("up", 3.0), ("gate", 3.0)):
        model = make_one()
        ll.inject(model, ll.LoRAConfig(r=32, lora_alpha=32, target_modules=[part], modules_to_save=None))
        mlp = model.model.layers[0].mlp
        site = mlp.gate_up_proj._lora_weights[part]
        U, S, V = torch.linalg.svd(site.lora_matrix(), full_matrices=False)
        with torch.no_grad():
            site.lora["default"].A.copy_(S[:, None] * V)
            site.lora["default"].B.copy_(U * (factor - 1))
        x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        assert torch.allclose(mlp(x), factor * before(x)) == (part == "up")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_equation_and_all_gradients(name, options):
    """A layer with the merged weight of its equation, and the gradients that this gives."""
    model, plan = adapted(name, **options)
    parts = {target.name: target for target in plan.targets}
    assert {target.name.rpartition(".")[2] for target in plan.targets} == {"q", "v"}
    assert {target.r for target in parts.values()} == {3, 6}
    out = model(ids(), labels=ids())
    out.loss.backward()
    twin = make(name)
    values, weights = {}, {}
    for key, parameter in model.named_parameters():
        if ".lora." in key:
            values[key] = parameter.detach().clone().requires_grad_()
    for node_name, target in parts.items():
        owner, _, part = node_name.rpartition(".")
        site = model.get_submodule(owner)._lora_weights[part]
        layout, inner = site.lora_layout, f"{owner}._lora_weights.{part}.lora.default"
        W = site.lora_matrix()
        s = target.lora_alpha / (target.r**0.5 if options.get("use_rslora") else target.r)
        merged = W + s * values[f"{inner}.B"] @ values[f"{inner}.A"]
        if options.get("use_dora"):
            norm = merged.detach().norm(dim=1)
            merged = (values[f"{inner}.magnitude"] / norm)[:, None] * merged
        weights.setdefault(owner, []).append(layout.rows_widened(merged - W))
    changed = {}
    for owner, changes in weights.items():
        weight = twin.get_parameter(f"{owner}.weight")
        change = sum(changes)
        changed[f"{owner}.weight"] = weight.detach() + (change.T if name == "gpt2" else change)
    expected = torch.func.functional_call(twin, changed, args=(ids(),), kwargs={"labels": ids()})
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits)
    for key, value in values.items():
        torch.testing.assert_close(
            model.get_parameter(key).grad, value.grad, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging(name, use_dora):
    model, _ = adapted(name, use_dora=use_dora)
    logits, before = model(ids()).logits, [p.clone() for p in model.parameters()]
    ll.merge(model)
    torch.testing.assert_close(model(ids()).logits, logits)
    with pytest.raises(ll.ConfigError, match="merged already"):
        ll.merge(model)
    ll.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(model(ids()).logits, logits)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(ids()).logits, logits)
    assert model.state_dict().keys() == make(name).state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in make(name).modules()]


def three_parts(name, use_dora=False):
    """A model with adapters on all parts of its layers, and what there is to compare."""
    model, _ = adapted(name, target_modules=["q", "k", "v"], use_dora=use_dora)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    return model, base, model(ids()).logits.detach()


def is_base(model, base):
    return all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_disabling_merged_parts(name):
    """They were merged one after the other into one weight, and each knows what it found."""
    model, base, logits = three_parts(name)
    ll.merge(model)
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    assert not is_base(model, base)
    for _ in range(2):
        with ll.disable_adapters(model), ll.disable_adapters(model):
            assert is_base(model, base)
            assert torch.equal(model(ids()).logits, make(name)(ids()).logits)
        assert is_base(model, merged)
    torch.testing.assert_close(model(ids()).logits, logits)
    ll.unmerge(model)
    assert is_base(model, base)
    assert torch.equal(model(ids()).logits, logits)


@pytest.mark.parametrize("broken_off", range(1, 7))
def test_disabling_merged_parts_that_is_broken_off(broken_off, monkeypatch):
    model, base, _ = three_parts("phi3")
    ll.merge(model)
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    swap, calls = Originals.swap, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == broken_off:
            raise KeyboardInterrupt
        swap(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Originals, "swap", interrupted)
        with pytest.raises(KeyboardInterrupt), ll.disable_adapters(model):
            raise AssertionError("six swaps are those of two layers")
    assert is_base(model, merged)
    ll.unmerge(model)
    assert is_base(model, base)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "gpt2"])
def test_probing_merged_parts(name, use_dora):
    model, base, logits = three_parts(name, use_dora)
    report = ll.merge(model, probe={"input_ids": ids()})
    assert 0 <= report.difference < 1e-12
    assert {layer.difference for layer in report.layers.values()} == {None}
    assert "differ by at most" in str(report)
    torch.testing.assert_close(model(ids()).logits, logits)
    ll.unmerge(model)
    assert is_base(model, base)
    assert torch.equal(model(ids()).logits, logits)


def test_a_folder_that_is_saved_while_parts_are_merged_is_of_the_base(tmp_path):
    model, _, logits = three_parts("phi3")
    ll.merge(model)
    ll.save_adapter(model, tmp_path / "adapter")
    again = make("phi3")
    ll.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(ids()).logits, logits)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_folders(name, options, tmp_path):
    """PEFT has one adapter on the whole layer, whose B has blocks; here it is taken apart again."""
    model, _ = adapted(name, torch.float32, **options)
    logits = model(ids()).logits
    ll.save_adapter(model, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(make(name, torch.float32), str(tmp_path / "first")).eval()
    torch.testing.assert_close(twin(ids()).logits, logits, rtol=1e-5, atol=1e-5)
    fields = json.loads((tmp_path / "first/adapter_config.json").read_text())
    assert fields["target_modules"] == [FAMILIES[name][1].rpartition(".")[2]]
    for folder, before in (("second", "first"), ("third", "second")):
        again = make(name, torch.float32)
        ll.load_adapter(again, tmp_path / before)
        torch.testing.assert_close(again(ids()).logits, logits, rtol=1e-5, atol=1e-5)
        ll.save_adapter(again, tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()
    config = ll.adapters(again)["default"]
    assert (config.target_modules, config.rank_pattern) == (["q", "v"], {"v": 6})


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True, "init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_folders_keep_what_float64_adapters_are(options, tmp_path):
    model, _ = adapted("phi3", **options)
    logits = model(ids()).logits
    ll.save_adapter(model, tmp_path / "adapter")
    again = make("phi3")
    for name in ("default", "default"):  # the second time into what is there
        ll.load_adapter(again, tmp_path / "adapter", adapter_name=name)
        torch.testing.assert_close(ll.adapter_state_dict(again), ll.adapter_state_dict(model), rtol=1e-14, atol=0)
    ll.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(ids()).logits, logits)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", ["q", "k"]),
        ("phi3", ["up", "gate"]),
        ("gpt2", ["k", "q"]),
        ("gpt2", ["q", "k", "v"]),
        ("bloom", ["v", "k"]),
    ],
)
def test_folders_have_parts_in_their_own_order(name, targets, use_dora, tmp_path):
    """Of one rank, so that shapes alone would not tell."""
    model, _ = adapted(
        name, target_modules=targets, rank_pattern=None, alpha_pattern={targets[0]: 2.0}, use_dora=use_dora
    )
    logits = model(ids()).logits
    ll.save_adapter(model, tmp_path / "adapter")
    again = make(name)
    ll.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(ll.adapter_state_dict(again), ll.adapter_state_dict(model), rtol=1e-14, atol=0)
    torch.testing.assert_close(again(ids()).logits, logits)


@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "gpt2"])
def test_merging_into_files(name, tmp_path):
    model, _ = adapted(name, torch.float32)
    make(name, torch.float32).save_pretrained(tmp_path / "base")
    ll.save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_combining_files(tmp_path):
    model, _ = adapted("phi3", torch.float32)
    ll.save_adapter(model, tmp_path / "adapter")
    combine_files(tmp_path / "twice", [(tmp_path / "adapter", 0.3), (tmp_path / "adapter", 0.7)])
    again = make("phi3", torch.float32)
    ll.load_adapter(again, tmp_path / "twice")
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_run_goes_on_bit_for_bit_and_is_exported(variant, tmp_path):
    def fit(folder, epochs, resume=None):
        module = Wrapped(lambda: make("phi3", torch.float32))
        options = {**OPTIONS, "target_modules": ["qkv_proj.q", "qkv_proj.v", "up"], "lora_dropout": 0.1}
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(ll.LoRA(**options, **variant), checkpoint, max_epochs=epochs)
        torch.manual_seed(5)
        run.fit(module, one_batch({"input_ids": ids(), "labels": ids()}, 3), ckpt_path=resume, weights_only=True)
        return module

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "part", 1)
    resumed = fit(tmp_path / "rest", 2, tmp_path / "part/epoch=0.ckpt")
    ours, theirs = (ll.adapter_state_dict(module) for module in (whole, resumed))
    assert "net.model.layers.0.mlp.gate_up_proj.up.lora.default.B" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], value) and value.any() for key, value in ours.items())
    file = tmp_path / "whole/epoch=1.ckpt"
    other = Wrapped(lambda: make("phi3", torch.float32))
    ll.load_adapter(other, file)
    assert torch.equal(other.net.eval()(ids()).logits, whole.net.eval()(ids()).logits)
    if variant.get("use_dora"):
        with pytest.raises(ll.UnsupportedError, match="needs the norms of the other rows"):
            export_checkpoint(file, tmp_path / "exported")
        return
    export_checkpoint(file, tmp_path / "exported")
    ll.save_adapter(whole, tmp_path / "saved", step=6)
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / part).read_bytes() == (tmp_path / "saved" / part).read_bytes()


def test_several_adapters_with_other_parts():
    model, _ = adapted("gpt-neox")
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, target_modules=["k", "v"], use_dora=True), "other")
    ll.set_adapter(model, "other")
    shake(model, "other")
    each = []
    for name in ("default", "other"):
        ll.set_adapter(model, name)
        each.append(model(ids()).logits)
    with ll.mixed_batch(model, ["default", "other"]):
        torch.testing.assert_close(model(ids()).logits, torch.stack([each[0][0], each[1][1]]))
    ll.set_adapter(model, {"default": 0.7, "other": -0.4})
    logits = model(ids()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ll.combine_adapters(model, {"default": 0.7, "other": -0.4}, "both", "svd", rank=32)
    ll.set_adapter(model, "both")
    torch.testing.assert_close(model(ids()).logits, logits)
    ll.merge(model)
    torch.testing.assert_close(model(ids()).logits, logits)
    ll.unmerge(model)
    ll.delete_adapter(model, "both")
    ll.delete_adapter(model, "other")
    ll.set_adapter(model, "default")
    torch.testing.assert_close(model(ids()).logits, each[0])
    ll.to_lora(model, rank=2)
    ll.truncate(model, rank=1)
    assert len(ll.analyze(model).layers) == 4
    ll.eject(model)
    assert torch.equal(model(ids()).logits, make("gpt-neox")(ids()).logits)


def test_copies_pickles_and_state_dicts():
    model, _ = adapted("falcon-groups", use_dora=True)
    logits = model(ids()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids()).logits, logits)
        owner = next(m for m in twin.modules() if hasattr(m, "_lora_weights"))
        assert owner._lora_weights["q"].lora_place[0] is owner
    fresh = make("falcon-groups")
    ll.inject(fresh, ll.LoRAConfig(**OPTIONS, use_dora=True))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(ids()).logits, logits)
    ll.merge(fresh)
    with pytest.raises(RuntimeError, match=r"merged into .* call ll.unmerge before loading weights"):
        fresh.load_state_dict(make("falcon-groups").state_dict(), strict=False)


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_without_graph_breaks(use_dora):
    model, _ = adapted("gpt-neox", use_dora=use_dora)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("before", [True, False])
def test_4_bit_bases(before):
    model = make("phi3", torch.float32)
    config = ll.LoRAConfig(r=3, lora_alpha=5, target_modules=["q", "up"], use_dora=True)
    for step in (lambda: ll.inject(model, config), lambda: ll.quantize(model, "nf4"))[:: 1 if before else -1]:
        step()
    shake(model)
    out = model(ids(), labels=ids())
    out.loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert type(model.model.layers[0].self_attn.qkv_proj).lora_plain_class.__name__ == "Linear4bit"
    with pytest.raises(ll.ConfigError, match="parts of packed layers: ll.merge_and_unload"):
        ll.merge(model)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(ids()).logits, out.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query_key_value", "q"]}, "as a whole and in parts: choose one"),
        ({"target_modules": ["all-linear", "query_key_value.q"]}, "as a whole and in parts: choose one"),
        ({"target_modules": ["query_key_value.w"]}, "matches nothing"),
        ({"target_modules": ["q"], "init_lora_weights": "loftq"}, "starts whole layers: name the layer itself"),
        ({"target_modules": ["q"], "init_lora_weights": "eva"}, "look at whole layers"),
        ({"target_modules": ["q"], "rank_pattern": "auto"}, "look at whole layers"),
    ],
)
def test_what_parts_can_not_have(options, message):
    with pytest.raises(ll.TargetError, match=message):
        ll.inject(make("gpt-neox"), ll.LoRAConfig(**options))


@pytest.mark.parametrize("first", ["query_key_value", "q"])
def test_two_adapters_are_not_on_a_layer_and_its_parts(first):
    model = make("gpt-neox")
    second = {"query_key_value": "q", "q": "query_key_value"}[first]
    ll.inject(model, ll.LoRAConfig(target_modules=[first]))
    with pytest.raises(ll.TargetError, match="as a whole and in parts"):
        ll.inject(model, ll.LoRAConfig(target_modules=[second]), "other")


@pytest.mark.parametrize("first", ["query_key_value", "q"])
def test_no_adapter_is_loaded_onto_a_layer_and_its_parts(first, tmp_path):
    second = {"query_key_value": "q", "q": "query_key_value"}[first]
    plain = {"rank_pattern": None, "alpha_pattern": None}
    other, _ = adapted("gpt-neox", target_modules=[second], **plain)
    ll.save_adapter(other, tmp_path / "adapter")
    model, _ = adapted("gpt-neox", target_modules=[first], **plain)
    logits, names = model(ids()).logits, [name for name, _ in model.named_parameters()]
    message = r"as a whole and in parts: take the others off by ll\.delete_adapter"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load_adapter(model, tmp_path / "adapter", "other")
    assert torch.equal(model(ids()).logits, logits)
    assert [name for name, _ in model.named_parameters()] == names
    ll.delete_adapter(model, "default")
    ll.load_adapter(model, tmp_path / "adapter", "other")
    torch.testing.assert_close(model(ids()).logits, other(ids()).logits)


def test_patterns_that_mean_the_whole_layer_still_do():
    plan = ll.plan(make("gpt2"), ll.LoRAConfig(target_modules=r".*\.attn\..*"))
    assert {target.name.rpartition(".")[2] for target in plan.targets} == {"c_attn", "c_proj"}


def test_checkpoints_merge_by_way_of_a_folder(tmp_path):
    module = Wrapped(lambda: make("gpt-neox", torch.float32))
    run = trainer(ll.LoRA(**OPTIONS), ModelCheckpoint(tmp_path, filename="last"))
    run.fit(module, one_batch({"input_ids": ids(), "labels": ids()}))
    make("gpt-neox", torch.float32).save_pretrained(tmp_path / "base")
    with pytest.raises(ll.UnsupportedError, match="parts of layers: make a PEFT folder of it first"):
        merge_files(tmp_path / "base", tmp_path / "last.ckpt", tmp_path / "merged")


@pytest.mark.parametrize(
    ("noted", "said"),
    [
        (5, "of the parts of a layer"),
        (["q"], "of the parts of a layer"),
        ({}, "of the parts of a layer"),
        ({"q": 3}, "of the parts of a layer"),
        ({"q": [3]}, "of the parts of a layer"),
        ({"q": [-3, 5.0], "v": [12, 2.0]}, "of the parts of a layer"),
        ({"q": [3, 0.0], "v": [6, 2.0]}, "of the parts of a layer"),
        ({"w": [9, 5.0]}, r"has no parts gpt_neox.*query_key_value\.w in this model: load it into"),
        ({"q": [3, 5.0, True], "v": [6, 2.0]}, "have 12 ranks together, and its tensors 9: copy the folder again"),
        ({"q": [3, 5.0, 2], "v": [6, 2.0]}, "of the parts of a layer"),
        ({"q": [3, 5.0, True, True], "v": [6, 2.0]}, "of the parts of a layer"),
    ],
    ids=str,
)
def test_what_a_file_says_of_parts_and_makes_no_sense(noted, said, tmp_path, monkeypatch):
    model, _ = adapted("gpt-neox", torch.float32)
    owner = "gpt_neox.layers.0.attention.query_key_value"
    monkeypatch.setattr("lightning_lora.formats.peft_parts.ExportedParts.noted", lambda self: {owner: noted})
    ll.save_adapter(model, tmp_path / "odd")
    other = make("gpt-neox", torch.float32)
    before = other(ids()).logits
    with pytest.raises(ll.CheckpointError, match=said):
        ll.load_adapter(other, tmp_path / "odd")
    assert torch.equal(other(ids()).logits, before)
