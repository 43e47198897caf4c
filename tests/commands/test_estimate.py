"""``plan``, ``estimate`` and ``latency``: from a configuration alone, and on a model that is there."""

import json

import pytest
import torch
import transformers as tf

import lightning_lora as ll
from lightning_lora.analysis.latency import measure_latency
from lightning_lora.layers import LoRALayer, lora_layers
from tests.commands.files import adapted, fails, run
from tests.helpers.families import DECODER, FAMILIES, KV
from tests.helpers.modules import Wrapped, one_batch, trainer


def described(tmp_path, config=None):
    """A folder with a configuration and nothing else."""
    config = config or tf.LlamaConfig(**DECODER, **KV)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def base(tmp_path):
    FAMILIES["llama"].make().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def told(capsys, *arguments) -> dict | list:
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_plan(tmp_path, capsys):
    model = described(tmp_path)
    expected = ll.plan(FAMILIES["llama"].make(), ll.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    run("plan", model, "--r", 4, "--target-modules", "q_proj", "v_proj")
    assert capsys.readouterr().out == f"{expected}\n"
    found = told(capsys, "plan", model / "config.json", "--r", 4, "--use-dora", "--exclude-modules", "mlp")
    same = ll.plan(FAMILIES["llama"].make(), ll.LoRAConfig(r=4, use_dora=True, exclude_modules=["mlp"]))
    assert found["trainable_parameters"] == same.trainable_parameters
    assert [target["name"] for target in found["targets"]] == [target.name for target in same.targets]
    assert found["skipped"] == dict(same.skipped)
    run("plan", model, "--r", 100, "--target-modules", "k_proj")
    assert "note: model.layers.0.self_attn.k_proj: r=100 is more than the rank" in capsys.readouterr().out


def test_layers_with_a_forward_of_their_own_are_tried_with_numbers():
    """Where the estimate has shapes alone."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        falcon = tf.FalconForCausalLM(tf.FalconConfig(**sizes)).eval()
    found = ll.estimate_memory(falcon, ll.LoRAConfig(r=4), batch_size=1, seq_len=8)
    assert 0 < found.total < ll.estimate_memory(falcon, None, batch_size=1, seq_len=8).total


def test_options_of_adapters_without_adapters(tmp_path, capsys):
    model = described(tmp_path)
    for options in (["--r", 2], ["--use-dora"], ["--target-modules", "q_proj"]):
        said = fails(2, capsys, "estimate", model, "--full", "--compare", *options)
        assert "--full trains the whole model, without adapters" in said
    assert told(capsys, "estimate", model, "--full", "--compare", "--seq-len", 8)["compared"]


def test_estimate(tmp_path, capsys):
    model = described(tmp_path)
    options = ["--r", 4, "--batch-size", 2, "--seq-len", 32, "--quantization", "nf4-dq", "--card", "24GiB"]
    found = told(capsys, "estimate", model, *options, "--gradient-checkpointing", "--optimizer", "paged_adamw8bit")
    expected = ll.estimate_memory(
        FAMILIES["llama"].make().eval(),
        ll.LoRAConfig(r=4),
        "nf4-dq",
        "paged_adamw8bit",
        batch_size=2,
        seq_len=32,
        precision="bf16-true",
        gradient_checkpointing=True,
        card=24,
    )
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert found["fits"] is True
    run("estimate", model, "--seq-len", 16, "--full", "--precision", "32-true")
    said = capsys.readouterr().out
    assert "adapter=none" in said
    assert "trained in full" in said
    run("estimate", model, "--seq-len", 16, "--compare", "--strategy", "fsdp2", "--devices", 2)
    said = capsys.readouterr().out
    assert all(words in said for words in ("full fine-tuning", "QLoRA nf4-dq", "strategy=fsdp2, devices=2"))


def test_quantised_configurations_stand_for_the_dense_model(tmp_path, capsys):
    config = tf.LlamaConfig(**DECODER, **KV)
    model = described(tmp_path, config)
    dense = told(capsys, "estimate", model, "--seq-len", 16)
    fields = json.loads((model / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(fields))
    assert told(capsys, "estimate", model, "--seq-len", 16) == dense


@pytest.mark.parametrize("command", ["plan", "estimate"])
def test_models_that_are_none(command, tmp_path, capsys):
    model = described(tmp_path)
    assert "is neither here nor on the hub" in fails(2, capsys, command, "nobody")
    assert "is neither here nor on the hub" in fails(2, capsys, command, "nobody/nothing")
    assert "./nobody does not exist: give a folder with config.json" in fails(2, capsys, command, "./nobody")
    assert "holds no config.json" in fails(2, capsys, command, tmp_path)
    config = model / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "architectures": ["MyOwnModel"]}))
    said = fails(1, capsys, command, model)
    assert "is of MyOwnModel, which transformers" in said
    assert "call ll.estimate_memory or ll.plan" in said
    config.write_text(json.dumps({**fields, "architectures": None}))
    assert "its configuration names no architectures" in fails(1, capsys, command, model)
    config.write_text(json.dumps({**fields, "architectures": [5]}))
    assert "is of 5, which transformers" in fails(1, capsys, command, model)
    config.write_text(json.dumps({**fields, "hidden_size": "wide"}))
    assert fails(2, capsys, command, model).startswith(f"lightning-lora: {model} is no configuration")
    config.write_text("{")
    assert "is no configuration of a transformers model" in fails(2, capsys, command, model)


def test_arguments_that_are_wrong(tmp_path, capsys):
    model = described(tmp_path)
    said = fails(2, capsys, "estimate", model, "--card", "big", "--optimizer", "adamx", "--strategy", "dp")
    assert all(words in said for words in ("4 problems", "card must be", "optimizer must be", "strategy must be"))
    assert "must be a whole number of at least 1, got '0'" in fails(2, capsys, "estimate", model, "--devices", 0)
    assert "has 64 positions, got 65" in fails(2, capsys, "estimate", model, "--seq-len", 65)
    assert "'q_prj'" in fails(1, capsys, "plan", model, "--target-modules", "q_prj")
    assert "lora_alpha must be finite and not 0" in fails(2, capsys, "plan", model, "--lora-alpha", 0)


def test_latency(base, tmp_path, capsys):
    ll.save_adapter(adapted(FAMILIES["llama"].make()), tmp_path / "a")
    for options in (["latency", tmp_path / "a"], ["latency", "--r", 2, "--use-dora"]):
        found = told(capsys, *options, "--base", base, "--rounds", 2, "--seq-len", 1, 8)
        assert [each["seq_len"] for each in found] == [1, 8]
        for each in found:
            kept = ["dora_caching"] if "--use-dora" in options else []
            assert [timing["name"] for timing in each["forward"]] == ["base", "adapted", "merged", *kept]
            assert [timing["name"] for timing in each["others"]] == ["switch", "merge", "unmerge"]
            assert each["forward"][0]["ratio"] == 1
            assert all(0 < timing["low"] <= timing["high"] for timing in (*each["forward"], *each["others"]))
    run("latency", "--base", base, "--rounds", 1, "--dtype", "bfloat16")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch 1, 128 tokens"
    assert [line.split()[0] for line in lines[1:]] == [
        "forward",
        "base",
        "adapted",
        "merged",
        "switch",
        "merge",
        "unmerge",
    ]


def test_latency_of_one_of_several_adapters(base, tmp_path, capsys):
    made, module = FAMILIES["llama"], Wrapped(FAMILIES["llama"].make)
    adapters = [ll.LoRA(r=r, use_dora=r == 3, adapter_name=name) for name, r in (("one", 2), ("three", 3))]
    fit = trainer(*adapters)
    fit.fit(module, one_batch(made.batch(module.net)))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    path, options = tmp_path / "run.ckpt", ("--base", base, "--rounds", 1, "--seq-len", 2)
    for name, count in (("one", 3), ("three", 4)):
        (found,) = told(capsys, "latency", path, "--adapter", name, *options)
        assert len(found["forward"]) == count  # DoRA's norms are kept in one of them
    assert "one, three" in fails(1, capsys, "latency", path, *options)
    ll.save_adapter(module, tmp_path / "alone", "one")
    assert "nosuch" in fails(2, capsys, "latency", tmp_path / "alone", "--adapter", "nosuch", *options)


@pytest.mark.parametrize("active", [("default",), ("default", "other")])
def test_timing_leaves_the_model_as_it_was(active):
    model = FAMILIES["llama"].make()
    for name in active:
        model = adapted(model, name)
    ll.set_adapter(model, list(active))
    batch = {"input_ids": torch.randint(3, 61, (2, 7))}
    before, classes = model(**batch).logits, [type(module) for module in model.modules()]
    outputs = {"base": [], "adapted": []}

    def seen(module, args, output):
        is_bare = not any(isinstance(m, LoRALayer) for m in model.modules())
        outputs["base" if is_bare else "adapted"].append(output.logits)

    hook = model.register_forward_hook(seen)
    found = measure_latency(model, 2, 5, rounds=2, repeat=1)
    hook.remove()
    assert [timing.name for timing in found.others] == ["merge", "unmerge"]  # there is no other to switch to
    assert all(torch.equal(out, outputs["base"][0]) for out in outputs["base"])
    assert len(outputs["base"]) == 2 * 2
    assert not torch.allclose(outputs["base"][0], outputs["adapted"][0])
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch).logits, before)
    assert all(layer.lora_active == active for _, layer in lora_layers(model))


def test_what_latency_refuses(base, tmp_path, capsys):
    model = FAMILIES["llama"].make()
    with pytest.raises(ll.ConfigError, match="one adapter or more must be active, found none"):
        measure_latency(model, 1, 4)
    assert "can't be used" in fails(2, capsys, "latency", "--base", base, "--device", "warp")
    assert "is a file: give a folder" in fails(2, capsys, "latency", "--base", base / "config.json")
    assert "the following arguments are required: --base" in fails(2, capsys, "latency")
    assert "has ranks and layers of its own" in fails(2, capsys, "latency", tmp_path, "--base", base, "--r", 4)
    assert "give that file" in fails(2, capsys, "latency", "--base", base, "--adapter", "one")
