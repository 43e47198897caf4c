"""Prefixes and prompts in PEFT folders: what PEFT loads computes the same, and what PEFT wrote loads here."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_lora as ll
from lightning_lora.comparators import BottleneckConfig, PrefixTuning, PrefixTuningConfig
from tests.comparators.methods import VIRTUAL, Lit, batch, frozen, stirred
from tests.helpers.modules import one_batch, trainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
OTHERS = {
    "prefix": lambda task: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task),
    "prefix-network": lambda task: peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type=task, prefix_projection=True, encoder_hidden_size=5
    ),
    "prompt": lambda task: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=task),
}
CASES = [(family, name) for family in TASKS for name in OTHERS if (family, name) != ("gpt2", "prefix-network")]


@pytest.fixture
def folder(tmp_path):
    """Not the current one, which can't be replaced."""
    return tmp_path / "adapter"


def logits(model, family):
    """Those of the real tokens: PEFT gives those of a prompt too."""
    with torch.no_grad():
        found = model(**batch(family)).logits
    return found[:, -7:] if found.dim() == 3 else found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_from_peft(family, name, folder):
    theirs = stirred(peft.get_peft_model(frozen(family), OTHERS[name](TASKS[family])).double().eval())
    theirs.save_pretrained(folder)
    ours = frozen(family)
    ll.load_adapter(ours, folder)
    torch.testing.assert_close(logits(ours, family), logits(theirs, family))
    assert list(ll.adapters(ours)) == [name.partition("-")[0]]
    trained = {key for key, p in ours.named_parameters() if p.requires_grad}
    assert all("lora_added" in key or key.startswith("classifier.") for key in trained)
    ll.eject(ours)
    assert torch.equal(logits(ours, family), logits(frozen(family), family))  # the head's first values too


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0] != "t5" or case[1] == "prompt"])
def test_to_peft(family, name, folder):
    ours = frozen(family)
    ll.inject(ours, VIRTUAL[name], "mine")
    stirred(ours)
    ll.save_adapter(ours, folder, "mine")
    theirs = peft.PeftModel.from_pretrained(frozen(family), folder).eval()
    tolerances = {"rtol": 0, "atol": 1e-6} if name == "prefix-network" else {}  # PEFT keeps what it makes in float32
    torch.testing.assert_close(logits(theirs, family), logits(ours, family), **tolerances)
    again = frozen(family)
    ll.load_adapter(again, folder)
    assert list(ll.adapters(again)) == ["mine"]
    torch.testing.assert_close(logits(again, family), logits(ours, family))
    if name == "prefix" and family == "llama":
        ids = batch(family)["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(theirs.generate(input_ids=ids, **options), ours.generate(input_ids=ids, **options))


def test_layers_of_a_decoder_behind_an_encoder(folder):
    """PEFT reads every second layer's prefix there, and goes around: of an odd number of layers it reads each once."""
    import transformers as tf

    def build(layers):
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4}
        return (
            tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)).double().eval()
        )

    ours = build(3)
    ll.inject(ours, VIRTUAL["prefix"])
    ll.save_adapter(stirred(ours), folder)
    theirs = peft.PeftModel.from_pretrained(build(3), folder).eval()
    torch.testing.assert_close(logits(theirs, "t5"), logits(ours, "t5"))
    even = build(2)
    ll.inject(even, VIRTUAL["prefix"])
    with pytest.raises(ll.UnsupportedError, match=r"one decoder layer to another .*even \(2\)"):
        ll.save_adapter(stirred(even), folder)


def test_a_run_writes_folders(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    module, saver = Lit(), ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    callback = PrefixTuning(num_virtual_tokens=3, save_peft=True)
    trainer(callback, saver).fit(module, one_batch(batch("bert")))
    card = (tmp_path / "last.peft" / "README.md").read_text()
    assert "prefix tuning, made with lightning-lora" in card
    theirs = peft.PeftModel.from_pretrained(frozen("bert").float(), tmp_path / "last.peft").eval()
    torch.testing.assert_close(logits(theirs, "bert"), logits(module.net.eval(), "bert"))


def test_beside_lora_of_another_folder(tmp_path):
    model = frozen("llama")
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.inject(model, VIRTUAL["prompt"], "prompt")
    stirred(model)
    both = logits(model, "llama")
    for name in ("default", "prompt"):
        ll.save_adapter(model, tmp_path / name, name)
    again = frozen("llama")
    for name in ("default", "prompt"):
        ll.load_adapter(again, tmp_path / name)
    assert not torch.allclose(logits(again, "llama"), both)  # the first one is active
    ll.set_adapter(again, ["default", "prompt"])
    torch.testing.assert_close(logits(again, "llama"), both)
    ll.set_adapter(model, "default")
    ll.delete_adapter(again, "prompt")
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"))
    with pytest.raises(ll.ConfigError, match=r"'prompt' \(prompt_tuning\) takes part or not: its weight is 1, got 0.5"):
        ll.set_adapter(model, {"default": 1, "prompt": 0.5})
    ll.set_adapter(model, ["default", "prompt"])
    with pytest.raises(ll.ConfigError, match="prompt_tuning can't be merged into weights"):
        ll.merge_and_unload(model)
    with (
        pytest.raises(ll.ConfigError, match="prompt_tuning is the same for all samples"),
        ll.mixed_batch(model, [None]),
    ):
        pass


def test_heads_change_place_with_prompts_too(tmp_path):
    configs = {"a": ll.LoRAConfig(r=2), "b": ll.LoRAConfig(r=3), "prompt": VIRTUAL["prompt"]}
    outputs, model = {"base": logits(frozen("bert"), "bert")}, frozen("bert")
    for i, (name, config) in enumerate(configs.items()):
        alone = frozen("bert")
        ll.inject(alone, config, name)
        torch.manual_seed(i)
        torch.nn.init.normal_(stirred(alone).classifier.weight)
        outputs[name] = logits(alone, "bert")
        ll.save_adapter(alone, tmp_path / name, name)
    for name in ("a", "b"):
        ll.load_adapter(model, tmp_path / name)
    ll.set_adapter(model, "b")
    ll.load_adapter(model, tmp_path / "prompt")
    assert torch.equal(logits(model, "bert"), outputs["b"])
    assert not any(p.requires_grad for key, p in model.named_parameters() if "prompt" in key)
    ll.set_adapter(model, "prompt")
    assert torch.equal(logits(model, "bert"), outputs["prompt"])
    with ll.disable_adapters(model):
        assert torch.equal(logits(model, "bert"), outputs["base"])
    assert torch.equal(logits(model, "bert"), outputs["prompt"])
    ll.delete_adapter(model, "a")
    assert torch.equal(logits(model, "bert"), outputs["prompt"])
    ll.delete_adapter(model, "prompt")
    assert torch.equal(logits(model, "bert"), outputs["base"])


def test_what_is_wrong_with_a_folder(folder):
    model = frozen("bert")
    ll.inject(model, VIRTUAL["prefix"])
    ll.save_adapter(model, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(weights)

    written = weights.read_bytes()

    def refused(words, error=ll.CheckpointError, base=None, tensors=tensors, kept=False, **changed):
        config.write_text(json.dumps({**fields, **changed}))
        if kept:  # with what it says of itself
            weights.write_bytes(written)
        else:
            save_file(tensors, weights)
        other = frozen("bert") if base is None else base
        keys = other.state_dict().keys()
        with pytest.raises(error, match=words):
            ll.load_adapter(other, folder)
        assert other.state_dict().keys() == keys
        assert not ll.adapters(other)

    ll.load_adapter(frozen("bert"), folder)
    changed = frozen("bert")
    torch.nn.init.normal_(changed.bert.pooler.dense.weight)
    with pytest.raises(ll.BaseMismatchError, match="allow_base_mismatch=True"):
        ll.load_adapter(changed, folder)
    ll.load_adapter(changed, folder, allow_base_mismatch=True)
    refused(r"the prefix is \(3, 128\) in the file -> \(4, 128\)", num_virtual_tokens=4)
    refused("modules_to_save is None in adapter_config.json, and was written as", kept=True, modules_to_save=None)
    refused("modules_to_save must be a list of names, got 5", modules_to_save=5)
    refused("num_virtual_tokens must be a positive integer", num_virtual_tokens=None)
    refused("num_transformer_submodules must be 1 or 2, got 'x'", num_transformer_submodules="x")
    refused("holds no prompt_embeddings", tensors={k: v for k, v in tensors.items() if "classifier" in k})
    refused(
        "modules_to_save: 'classifier' matches nothing",
        base=torch.nn.ModuleDict({"a": frozen("bert").bert}),
        tensors=tensors,
    )
    refused("classifier.bias: .*in the file", tensors={**tensors, "base_model.classifier.bias": torch.zeros(9)})
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "peft_type": "P_TUNING"}))
    with pytest.raises(ll.UnsupportedError, match="peft_type 'P_TUNING'"):
        ll.load_adapter(frozen("bert"), folder)


def test_what_peft_has_not(folder):
    model = frozen("bert")
    ll.inject(model, BottleneckConfig())
    with pytest.raises(ll.UnsupportedError, match="PEFT has no 'bottleneck': keep adapter 'default' in a checkpoint"):
        ll.save_adapter(model, folder)
    with pytest.raises(
        ll.UnsupportedError, match="adapter 'default' is bottleneck, and this takes adapters of LoRA only"
    ):
        ll.analyze(model)
    with pytest.raises(ll.ConfigError, match="already has an adapter 'default'.*another configuration"):
        ll.inject(model, PrefixTuningConfig())


def test_a_process_that_never_asked_for_other_methods_reads_their_files(folder, tmp_path):
    """They register when something of theirs is imported."""
    peft.get_peft_model(frozen("llama"), OTHERS["prefix"](TASKS["llama"])).save_pretrained(folder)
    torch.save(frozen("llama"), tmp_path / "model.pt")
    code = (
        "import sys, torch, lightning_lora as ll\n"
        "assert 'lightning_lora.comparators' not in sys.modules\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"ll.load_adapter(model, {str(folder)!r})\n"
        "print([config.method for config in ll.adapters(model).values()])"
    )
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert end.stdout.strip() == "['prefix_tuning']", end.stderr
