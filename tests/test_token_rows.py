"""trainable_token_indices: rows of token tables, trained one by one, the rest of the table frozen."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers as tf
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import lightning_lora as ll
from lightning_lora.files.merge import merge_files
from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
from tests.helpers.families import DECODER, FAMILIES, KV
from tests.helpers.modules import Wrapped, one_batch, trainer

NAMES = ["llama", "qwen2-tied", "gemma2", "gpt2", "opt", "bert", "t5", "whisper"]
TOKENS = [5, 60, 7]


def adapted(name, dtype=torch.float64, **options):
    """A model with rows of some tokens that were changed, and a batch in which these tokens are."""
    model = FAMILIES[name].make().to(dtype).eval()
    batch = batch_of(name, model)
    options = {"r": 3, "lora_alpha": 5, "trainable_token_indices": TOKENS, "modules_to_save": None, **options}
    plan = ll.inject(model, ll.LoRAConfig(**options))
    shake(model)
    return model, batch, plan


def batch_of(name, model):
    batch = FAMILIES[name].batch(model)
    batch = {k: v.to(next(model.parameters()).dtype) if v.is_floating_point() else v for k, v in batch.items()}
    where = "labels" if name == "whisper" else "input_ids"
    batch[where] = batch[where].clone()
    batch[where][0, :3] = torch.tensor(TOKENS)
    return batch


def shake(model, adapter_name="default", std=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".lora.{adapter_name}." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def rows_of(model, adapter_name="default"):
    found = {n: p for n, p in model.named_parameters() if n.endswith(f".lora.{adapter_name}.rows")}
    assert len(found) == 1
    return next(iter(found.items()))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_model_with_these_rows_in_its_table(name):
    """Outputs, and all gradients; also where an output embedding is tied to the table."""
    model, batch, _ = adapted(name)
    key, rows = rows_of(model)
    table = key.replace(".lora.default.rows", ".weight")
    out = model(**batch)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    twin = copy.deepcopy(model)
    for layer in [m for m in twin.modules() if hasattr(m, "lora") and not hasattr(m.lora["default"], "A")]:
        layer.lora_active = ()
    values = rows.detach().clone().requires_grad_()
    frozen = twin.get_parameter(table).detach()
    changed = frozen.index_copy(0, torch.tensor(TOKENS), values)
    tied = [n for n, p in twin.named_parameters(remove_duplicate=False) if p is twin.get_parameter(table)]
    expected = functional_call(twin, dict.fromkeys(tied, changed), kwargs=batch)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(rows.grad, values.grad)


@pytest.mark.parametrize("name", NAMES)
def test_as_peft_has_it(name, tmp_path):
    """Outputs and gradients of its own layers, and the folder both ways."""
    model, batch, _ = adapted(name, torch.float32)
    model(**batch).loss.backward()
    logits = model(**batch).logits.detach()
    ll.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(FAMILIES[name].make(), str(tmp_path / "ours"), is_trainable=True).eval()
    torch.testing.assert_close(twin(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    twin(**batch).loss.backward()
    (delta,) = {p for n, p in twin.named_parameters() if "trainable_tokens_delta" in n}
    torch.testing.assert_close(rows_of(model)[1].grad, delta.grad, rtol=1e-4, atol=1e-6)
    twin.save_pretrained(str(tmp_path / "theirs"))
    again = FAMILIES[name].make().eval()
    ll.load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    ll.save_adapter(again, tmp_path / "second")
    third = FAMILIES[name].make().eval()
    ll.load_adapter(third, tmp_path / "second")
    ll.save_adapter(third, tmp_path / "third")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_before_training_and_only_rows_train(name):
    model = FAMILIES[name].make().double().eval()
    batch = batch_of(name, model)
    before = model(**batch).logits
    plan = ll.inject(model, ll.LoRAConfig(target_modules=[], trainable_token_indices=TOKENS, modules_to_save=None))
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-12, atol=1e-14)
    (trained,) = (n for n, p in model.named_parameters() if p.requires_grad)
    assert trained == rows_of(model)[0]
    assert plan.trainable_parameters == 3 * 32 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "rows of tokens" in str(plan)
    ll.eject(model)
    assert torch.equal(model(**batch).logits, before)
    assert not any(".lora." in key for key in model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_merging_keeps_what_is_tied(name, tmp_path):
    model, batch, _ = adapted(name)
    key = rows_of(model)[0].replace(".lora.default.rows", ".weight")
    table = model.get_parameter(key)
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is table]
    before, logits = table.clone(), model(**batch).logits
    report = ll.merge(model)
    torch.testing.assert_close(model(**batch).logits, logits)
    assert all(model.get_parameter(n) is model.get_parameter(key) for n in tied)
    assert not any(layer.untied for layer in report.layers.values())
    ll.unmerge(model)
    assert torch.equal(model.get_parameter(key), before)
    assert all(model.get_parameter(n) is table for n in tied)
    torch.testing.assert_close(model(**batch).logits, logits)
    had = getattr(model.config, "tie_word_embeddings", None)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(**batch).logits, logits)
    assert all(model.get_parameter(n) is model.get_parameter(key) for n in tied)
    assert getattr(model.config, "tie_word_embeddings", None) == had
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-5, atol=1e-5)  # some scales reload rounded


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "t5"])
def test_merging_into_files(name, tmp_path):
    model, batch, _ = adapted(name, torch.float32)
    logits = model(**batch).logits
    FAMILIES[name].make().save_pretrained(tmp_path / "base")
    ll.save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    files = [load_file(path) for path in (tmp_path / "merged").glob("*.safetensors")]
    assert {key for file in files for key in file} == {
        key for path in (tmp_path / "base").glob("*.safetensors") for key in load_file(path)
    }


def several(name):
    """A model with two adapters, whose tokens overlap."""
    model, batch, _ = adapted(name, target_modules=["q_proj"])
    other = ll.LoRAConfig(r=2, lora_alpha=3, target_modules=["v_proj"], trainable_token_indices=[60, 9])
    ll.inject(model, other, "other")
    ll.set_adapter(model, "other")
    shake(model, "other")
    return model, batch


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_several_adapters(name):
    model, batch = several(name)
    table = model.model.embed_tokens.weight
    first, second = (model.model.embed_tokens.lora[n].rows.detach() for n in ("default", "other"))
    changed = table.clone()
    changed[TOKENS] += 0.7 * (first - table[TOKENS])
    changed[[60, 9]] -= 0.4 * (second - table[[60, 9]])
    ll.set_adapter(model, {"default": 0.7, "other": -0.4})
    torch.testing.assert_close(model.model.embed_tokens(batch["input_ids"]), changed[batch["input_ids"]])
    mixed = model(**batch).logits
    ll.merge(model)
    torch.testing.assert_close(model.model.embed_tokens.weight, changed)
    torch.testing.assert_close(model(**batch).logits, mixed)
    ll.unmerge(model)
    for method, options in (("cat", {}), ("svd", {"rank": 5})):
        ll.combine_adapters(model, {"default": 0.7, "other": -0.4}, method, method, **options)
        ll.set_adapter(model, method)
        torch.testing.assert_close(model(**batch).logits, mixed)
        assert ll.adapters(model)[method].trainable_token_indices == {"model.embed_tokens": [5, 60, 7, 9]}
    each = []
    for adapter_name in ("default", "other"):
        ll.set_adapter(model, adapter_name)
        each.append(model(**batch).logits)
    with ll.mixed_batch(model, ["default", "other"]):
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.stack([each[0][0], each[1][1]]))
    with pytest.raises(ll.ConfigError, match=r"rows of tokens are trained .* method='ties' can't combine"):
        ll.combine_adapters(model, {"default": 0.7, "other": -0.4}, "t", "ties", rank=2)
    ll.delete_adapter(model, "other")
    ll.set_adapter(model, "default")
    torch.testing.assert_close(model(**batch).logits, each[0])


def test_what_changes_pairs_leaves_rows_alone():
    model, batch, _ = adapted("qwen2-tied", use_dora=True)
    rows = rows_of(model)[1].clone()
    full = ll.to_lora(model, rank=32)
    assert not any("embed" in name for name in full.layers)
    ll.truncate(model, rank=2)
    assert torch.equal(rows_of(model)[1], rows)
    assert ll.adapters(model)["default"].trainable_token_indices == TOKENS
    assert {a.config.r for m in model.modules() for a in getattr(m, "lora", {}).values()} == {2}
    assert ll.analyze(model).layers


def test_copies_and_pickles():
    model, batch, _ = adapted("qwen2-tied")
    logits = model(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, logits)
        rows = twin.model.embed_tokens.lora["default"].rows
        assert twin.lm_head.lora["default"].origin.rows is rows
        assert rows is not model.model.embed_tokens.lora["default"].rows
        with torch.no_grad():
            rows.zero_()
    assert torch.equal(model(**batch).logits, logits)


def test_casts_keep_the_masters():
    model, batch, _ = adapted("qwen2-tied", torch.float32)
    rows = rows_of(model)[1].clone()
    model.bfloat16()
    assert model(**batch).logits.dtype == torch.bfloat16
    assert torch.equal(rows_of(model)[1], rows)
    adapter = model.model.embed_tokens.lora["default"]
    assert adapter.index.tolist() == TOKENS
    assert adapter.places.dtype == torch.int64


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_compiles_without_graph_breaks(name):
    model, batch, _ = adapted(name, target_modules=[])
    expected = model(**batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**batch)
    torch.testing.assert_close(found.logits, expected.logits)
    expected.loss.backward()
    grads = rows_of(model)[1].grad.clone()
    model.zero_grad()
    found.loss.backward()
    torch.testing.assert_close(rows_of(model)[1].grad, grads)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"padding_idx": 2}])
def test_options_of_embeddings(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 3)).double()
    ids = torch.tensor([[5, 5, 5, 2], [7, 5, 1, 2]])
    ll.inject(model, ll.LoRAConfig(r=2, trainable_token_indices={"0": [7, 5]}))
    shake(model)
    rows = model[0].lora["default"].rows
    table = model[0].weight.detach().clone()
    table[[7, 5]] = rows.detach()
    plain = nn.Embedding(11, 6, **options, _weight=table)
    weights = torch.randn(2, 4, 6).double()
    out = model[0](ids)
    (out * weights).sum().backward()
    expected = plain(ids)
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(rows.grad, plain.weight.grad[[7, 5]])


class Resized(Wrapped):
    """New tokens: their rows are other random ones whenever the model is built."""

    def __init__(self, seed, tie=True):
        def build():
            torch.manual_seed(0)
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, **KV, tie_word_embeddings=tie))
            torch.manual_seed(seed)
            model.resize_token_embeddings(64, mean_resizing=False)
            return model

        super().__init__(build)


def fit(seed, tie, folder, epochs, resume=None):
    module, tokens = Resized(seed, tie), [61, 62, 63]
    rows = tokens if tie else {"embed_tokens": tokens, "lm_head": tokens}
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    lora = ll.LoRA(r=3, lora_alpha=5, target_modules=["q_proj"], trainable_token_indices=rows)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 2:5] = torch.tensor(tokens)
    run = trainer(lora, checkpoint, max_epochs=epochs)
    run.fit(module, one_batch({"input_ids": ids, "labels": ids}, 3), ckpt_path=resume, weights_only=True)
    return module, ids


@pytest.mark.parametrize("tie", [True, False])
def test_a_run_with_new_tokens_goes_on(tie, tmp_path):
    """Bit for bit; and where the new rows of the base are other random ones, with the same result."""
    whole, ids = fit(1, tie, tmp_path / "whole", 2)
    fit(1, tie, tmp_path / "part", 1)
    path = tmp_path / "part/epoch=0.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    names = ["model.embed_tokens"] if tie else ["model.embed_tokens", "lm_head"]
    assert {key for key in state if "layers" not in key} == {f"net.{name}.lora.default.rows" for name in names}
    logits = whole.net.eval()(ids).logits
    assert not torch.allclose(logits, Resized(1, tie).net.eval()(ids).logits, rtol=1e-2)
    for seed in (1, 2):
        resumed, _ = fit(seed, tie, tmp_path / "rest", 2, resume=path)
        exact = {} if seed == 2 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(resumed.net.eval()(ids).logits, logits, **exact)
    file = tmp_path / "whole/epoch=1.ckpt"
    torch.testing.assert_close(ll.load_from_checkpoint(Resized, file, seed=3, tie=tie).net.eval()(ids).logits, logits)
    other = Resized(4, tie)
    ll.load_adapter(other, file)
    torch.testing.assert_close(other.net.eval()(ids).logits, logits)
    ll.save_adapter(whole, tmp_path / "saved", step=6)
    export_checkpoint(file, tmp_path / "exported")
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / part).read_bytes() == (tmp_path / "saved" / part).read_bytes()


def test_what_peft_writes_of_a_resized_model(tmp_path):
    """The tables too, and the rows of a tied table twice."""
    FAMILIES["qwen2-tied"].make().save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(64, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model)
        twin = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[61, 62]))
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        twin.save_pretrained(str(tmp_path / "theirs"))
    keys = load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    assert sum("trainable_tokens_delta" in key for key in keys) == 2
    assert sum("base_layer.weight" in key for key in keys) == 2
    ids = torch.tensor([[61, 5, 62, 7]])
    ll.load_adapter(base.eval(), tmp_path / "theirs")
    torch.testing.assert_close(base(ids).logits, twin.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ll.CheckpointError, match=r"has 61 rows, .* call model.resize_token_embeddings"):
        ll.load_adapter(FAMILIES["qwen2-tied"].make(), tmp_path / "theirs")


class Doubled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2


def doubled(model):
    model.model.embed_tokens.__class__ = Doubled
    return model


ELSEWHERE = {
    "bert": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**DECODER)),
        TOKENS,
        ("cls.predictions.decoder", "PEFT leaves the bias out"),
    ),
    "phi": (
        lambda: tf.PhiForCausalLM(tf.PhiConfig(**DECODER)),
        {"embed_tokens": TOKENS, "lm_head": TOKENS},
        ("lm_head", "PEFT leaves the bias out"),
    ),
    "own-forward": (
        lambda: doubled(FAMILIES["llama"].make()),
        TOKENS,
        ("model.embed_tokens", "PEFT leaves out what Doubled.forward does"),
    ),
}


@pytest.mark.parametrize(("make", "tokens", "why"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_peft_computes_otherwise_is_refused(make, tokens, why, tmp_path):
    """Both ways: and PEFT does compute something else."""
    base = make().eval()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    options = {"r": 2, "target_modules": r".*\.(q_proj|query)", "trainable_token_indices": tokens}
    model, ids = copy.deepcopy(base), torch.tensor([[5, 60, 7, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
        twin.save_pretrained(str(tmp_path / "theirs"))
    assert (twin(ids).logits - base(ids).logits).abs().max() > 1e-3
    with pytest.raises(ll.CheckpointError, match=rf"{why[1]} .*\({why[0]}\): merge it there"):
        ll.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    ll.inject(model, ll.LoRAConfig(**options, modules_to_save=None))
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    with pytest.raises(
        ll.UnsupportedError, match=f"{why[0]}: {why[1]}.*: merge the adapter, or keep it in a checkpoint"
    ):
        ll.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"trainable_token_indices": [61]}, r"embed_tokens has 61 rows, and no 61: call .*resize_token"),
        ("llama", {"trainable_token_indices": {"embed": [1]}}, r"'embed' matches nothing.*embed_tokens"),
        ("llama", {"trainable_token_indices": {"q_proj": [1], "norm": [2]}}, r"norm is a LlamaRMSNorm, which has no"),
        (
            "llama",
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "model.embed_tokens is in target_modules too: choose one",
        ),
        (
            "llama",
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "model.embed_tokens is trained in full",
        ),
        ("qwen2-tied", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "different rows"),
        ("qwen2-tied", {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "lm_head is trained in full"),
        ("vit", {"trainable_token_indices": [1]}, "ViTPatchEmbeddings, which has no rows"),
    ],
)
def test_what_a_model_can_not_have(name, options, message):
    with pytest.raises(ll.TargetError, match=message):
        ll.inject(FAMILIES[name].make(), ll.LoRAConfig(**options))


def test_the_padding_row_never_trains():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **KV, "pad_token_id": 3}))
    with pytest.raises(ll.TargetError, match="token 3 is its padding_idx, whose row gets no gradient"):
        ll.inject(model, ll.LoRAConfig(trainable_token_indices=[2, 3]))


def test_which_table_a_list_means():
    class Two(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.layers = nn.ModuleDict({first: nn.Embedding(9, 4), second: nn.Embedding(7, 4)})
            self.out = nn.Linear(4, 2)

    config = ll.LoRAConfig(r=1, trainable_token_indices=[1])
    with pytest.raises(ll.TargetError, match=r"a list means .* there are layers.words, layers.types"):
        ll.inject(Two("words", "types"), config)
    plan = ll.inject(Two("types", "embed_tokens"), config)
    assert [target.name for target in plan.targets if target.tokens] == ["layers.embed_tokens"]
    with pytest.raises(ll.TargetError, match="the model has none"):
        ll.inject(nn.Sequential(nn.Linear(4, 4)), config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must hold tokens"),
        ([-1], "must hold tokens"),
        ([True], "must hold tokens"),
        ([1, 2, 1], "holds 1 twice"),
        ({}, "trainable_token_indices is empty"),
        ({"embed": "1"}, r"\['embed'\] must hold tokens"),
        ({"": [1]}, "no name"),
        ({"re:(": [1]}, "not a valid regex"),
    ],
)
def test_what_is_no_tokens(value, message):
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRAConfig(trainable_token_indices=value)


def test_files_that_do_not_fit(tmp_path):
    model, _, _ = adapted("llama", torch.float32, target_modules=["q_proj"])
    ll.save_adapter(model, tmp_path / "rows")
    other = FAMILIES["llama"].make()
    ll.inject(other, ll.LoRAConfig(r=3, lora_alpha=5, target_modules=["q_proj"], trainable_token_indices=[5, 7, 60]))
    with pytest.raises(ll.CheckpointError, match="other rows of tokens in the file"):
        ll.load_adapter(other, tmp_path / "rows")
    tied = FAMILIES["qwen2-tied"].make()
    ll.inject(tied, ll.LoRAConfig(target_modules=["q_proj"], trainable_token_indices=[1]))
    tied.config.tie_word_embeddings = False
    with pytest.raises(ll.UnsupportedError, match="of which PEFT does not know"):
        ll.save_adapter(tied, tmp_path / "tied")
    alone = FAMILIES["llama"].make()
    ll.inject(alone, ll.LoRAConfig(target_modules=[], trainable_token_indices=[1]))
    with pytest.raises(ll.UnsupportedError, match="PEFT's LoRA needs a layer in target_modules"):
        ll.save_adapter(alone, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_consumers_are_told(tmp_path):
    model, batch, _ = adapted("llama", torch.float32, target_modules=["q_proj"])
    ll.save_adapter(model, tmp_path / "rows")
    assert not ll.lint(tmp_path / "rows", "peft")
    assert any("token_adapter" in str(finding.layer) for finding in ll.lint(tmp_path / "rows", "vllm"))
    plain = FAMILIES["llama"].make().eval()
    plain.load_adapter(str(tmp_path / "rows"))
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_rows_of_tokens_that_never_come_are_named_when_the_run_is_over(monkeypatch):
    """They may be rare, so that the run goes on."""
    monkeypatch.setattr("lightning_lora.training.watch.PATIENCE", 3)
    module = Wrapped(FAMILIES["llama"].make)
    ids = torch.tensor([[1, 2, 3, 4]])
    run = trainer(ll.LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=[50, 51]), max_epochs=1)
    with pytest.warns(UserWarning, match=r"1 trainable tensors never moved in this run: .*embed_tokens.*rows"):
        run.fit(module, one_batch({"input_ids": ids, "labels": ids}, 8))


def test_adapters_that_are_rows_alone():
    model, batch, _ = adapted("qwen2-tied", target_modules=[])
    logits = model(**batch).logits
    ll.combine_adapters(model, {"default": 1.0}, "other")
    ll.set_adapter(model, "other")
    torch.testing.assert_close(model(**batch).logits, logits)
    for convert in (ll.to_lora, ll.truncate):
        with pytest.raises(ll.ConfigError, match="rows of tokens alone, which have no rank"):
            convert(model, rank=2)
    with torch.no_grad():
        model.model.embed_tokens.lora["other"].rows[0, 0] = torch.nan
    with pytest.raises(ll.ConfigError, match="'other' holds NaN"):
        ll.combine_adapters(model, {"other": 1.0}, "third")


def test_combined_rows_are_kept_in_the_dtype_of_their_sources():
    model = FAMILIES["qwen2-tied"].make()
    ll.inject(model, ll.LoRAConfig(target_modules=[], trainable_token_indices=TOKENS))
    model.model.embed_tokens.lora["default"].rows.data = model.model.embed_tokens.lora["default"].rows.data.bfloat16()
    ll.combine_adapters(model, {"default": 1.0}, "other")
    assert model.model.embed_tokens.lora["other"].rows.dtype == torch.bfloat16


def test_rows_and_an_update_of_the_whole_table_are_not_combined():
    model, _, _ = adapted("llama", target_modules=["q_proj"])
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["embed_tokens"]), "whole")
    with pytest.raises(ll.ConfigError, match="embed_tokens: one of the adapters has rows of tokens there"):
        ll.combine_adapters(model, {"default": 0.5, "whole": 0.5}, "both")
