"""The command line as a new user would try it, in a folder of their own."""

import io
import json
import re
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from torch import distributed

import lightning_lora as ll
from lightning_lora.cli import main
from lightning_lora.formats.files import read
from lightning_lora.formats.shards_of_ranks import write_ranks
from lightning_lora.recipes import Recipe
from tests.helpers import forks, nodes
from tests.recipes import files

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "fit"
ROOT = CONFIGS.parents[2]
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=4",
    "--trainer.enable_progress_bar=false",
]
SHORT += ["--trainer.enable_model_summary=false", "--trainer.limit_val_batches=1", "--trainer.default_root_dir=run"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ckpt_path=.*:UserWarning",
    "ignore:The `srun` command is available:UserWarning",
    "ignore:In the future the default:FutureWarning",
)


def saved(pattern: str = "*.ckpt") -> str:
    return str(sorted(Path("run").rglob(pattern))[0])


def refused(capsys, *arguments: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == code
    return capsys.readouterr().err


@pytest.fixture
def data(tmp_path) -> str:
    return files.jsonl(tmp_path / "train.jsonl", files.prompts())


@pytest.mark.parametrize("name", ["lora", "qlora", "dora", "qdora", "classification", "dpo"])
def test_each_yaml_runs(name, llama, monkeypatch, tmp_path, capsys):
    """On a tiny model, from the repository's own folder, as its first line says."""
    monkeypatch.chdir(ROOT)
    more = [f"--model.base={llama}", f"--trainer.default_root_dir={tmp_path}", "--data.batch_size=2"]
    main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *SHORT, *more, f"--data.cache_dir={tmp_path}"])
    (path,) = tmp_path.rglob("best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == (4 if name in ("classification", "dpo") else 2)  # or 2 batches a step
    config, base = (checkpoint["lightning_lora"][key] for key in ("adapters", "base"))
    assert config["default"]["use_dora"] == (name in ("dora", "qdora"))
    assert base["quantization"] == ("nf4-dq" if name in ("qlora", "qdora") else None)
    said = capsys.readouterr().out
    assert f"checkpoint: {path}" in said
    assert "memory, estimated" in said
    if name == "lora":
        assert (path.with_suffix(".peft") / "adapter_config.json").exists()


def test_each_yaml_is_the_one_that_it_says():
    for path in CONFIGS.glob("*.yaml"):
        assert f"lightning-lora fit --config examples/configs/fit/{path.name}" in path.read_text().splitlines()[0]
        assert yaml.safe_load(path.read_text())["model"]["init_args"]["base"] == "demo"
    assert len(list(CONFIGS.glob("*.yaml"))) == 8


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("name", "packed"), [("ddp", None), ("fsdp2", "nf4-dq")])
def test_several_devices(name, packed, llama, tmp_path):
    """Two processes, for DDP started by the Trainer with the same command line; a base that is packed, then sharded."""
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), *SHORT, "--data.cache_dir=cache"]
    arguments += [f"--model.base={llama}", f"--data.train={ROOT}/examples/data/docstrings.jsonl", "--data.batch_size=2"]
    arguments.append(f"--lora.quantization={packed or 'null'}")
    if name == "ddp":
        (end,) = nodes.run(["-m", "lightning_lora", *arguments], [{}], tmp_path)
        said = end.output
        assert end.code == 0, said[-3000:]
    else:
        said = forks.finish("lightning_lora", arguments, forks.ranks(2), tmp_path)
    (path,) = tmp_path.rglob("best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["lightning_lora"]["base"]["quantization"] == packed
    assert said.count("checkpoint: ") == 1
    assert "memory, estimated" in said
    assert re.search(r"a step +8 rows \(2 x 2 accumulated x 2 devices\)", said)


def test_from_a_file_to_generated_text(llama, data, tmp_path, monkeypatch, capsys):
    """init, fit, predict, generate from the checkpoint and from the exported folder, merge: the commands it names."""
    main(["init", "train.jsonl", "--model", llama, "-o", "run.yaml"])
    assert "next: lightning-lora fit --config run.yaml" in capsys.readouterr().out
    text = Path("run.yaml").read_text()
    assert "# train.jsonl: 24 records, prompts with responses" in text
    config = yaml.safe_load(text)
    assert config["lora"] | {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "quantization": None} == config["lora"]
    assert config["trainer"]["accumulate_grad_batches"] == 4
    assert config["data"]["max_length"] == 64

    main(["fit", "--config", "run.yaml", *SHORT, "--model.lr=0.05", "--lora.r=4"])
    said = capsys.readouterr().out
    assert re.search(r"trained +3,712 parameters", said)
    assert re.search(r"memory, estimated +[\d.]+ [kM]B at most for tensors", said)
    assert re.search(r"memory: [\d.]+ [MG]B at most", said)
    path = saved("best.ckpt")
    for command in ("export", "generate", "merge"):
        assert f"lightning-lora {command}" in said
    assert yaml.safe_load(Path(saved("config.yaml")).read_text())["lora"]["r"] == 4

    more = [
        "--ckpt_path",
        path,
        "--data.predict=train.jsonl",
        "--model.max_new_tokens=6",
        "--predictions.path=out.jsonl",
    ]
    main(["predict", "--config", "run.yaml", *SHORT, "--lora.r=4", *more])
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in files.prompts()]

    capsys.readouterr()
    assert "has no adapter 'mine'. It has 'default'" in refused(
        capsys, "generate", path, "--adapter", "mine", "--prompt", "x"
    )
    main(["generate", path, "--prompt", rows[3]["prompt"], "--max-new-tokens", "6"])
    first = capsys.readouterr().out
    assert first.strip() == rows[3]["prediction"].strip()
    (export,) = re.findall(r"lightning-lora (export .*)", said)
    main(export.split())
    capsys.readouterr()
    main(["generate", export.split()[2], "--prompt", rows[3]["prompt"], "--max-new-tokens", "6"])
    assert capsys.readouterr().out == first
    (merge,) = re.findall(r"lightning-lora (merge .*)", said)
    main(merge.split())
    assert (Path(merge.split()[-1]) / "model.safetensors").exists()


def test_the_layout_that_vllm_and_transformers_expect(llama, data, capsys):
    """As in docs/recipes.md: what --lora-modules and load_adapter are given."""
    main(["fit", "--config", str(CONFIGS / "lora.yaml"), *SHORT, f"--model.base={llama}", f"--data.train={data}"])
    folder = Path(saved("best.peft"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 16)
    assert config["base_model_name_or_path"] == llama
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\..*\.lora_[AB]\.weight", key) for key in keys)
    main(["lint", str(folder), "--target", "vllm"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    model.load_adapter(str(folder))
    assert "default" in model.peft_config


def test_while_it_runs(llama, data, capsys):
    """Speed and memory among the metrics, samples in a file, the base's own values beside the adapted ones."""
    arguments = ["--samples.prompts=[Say it., Now]", "--samples.every_n_steps=1", "--samples.max_new_tokens=3"]
    config = ["--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", f"--data.train={data}"]
    main(["fit", *config, *SHORT, *arguments, "--trainer.log_every_n_steps=1", "--data.packing=false"])
    rows = [json.loads(line) for line in Path(saved("samples.jsonl")).read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (1, 2) for p in ("Say it.", "Now")]
    header = Path(saved("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"tokens_per_second", "memory_gb", "train/loss", "val/loss", "val_base/loss"} <= set(header)


def test_a_run_goes_on(llama, data, capsys):
    config = ["fit", "--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", f"--data.train={data}", *SHORT]
    config += ["--data.packing=false", "--model.schedule=constant"]
    said = refused(capsys, "validate", *config[1:], "--ckpt_path=last")
    assert "ckpt_path last: there is no last.ckpt of a run in run: give the file of a checkpoint" in said
    with pytest.warns(UserWarning, match="no last.ckpt of a run in run: this one begins anew"):
        main([*config, "--ckpt_path=last"])  # a command that is given again and again
    main([*config, "--trainer.max_epochs=2", f"--ckpt_path={saved('last.ckpt')}"])
    capsys.readouterr()
    main([*config, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert "6, 4 done" in capsys.readouterr().out
    steps = {torch.load(path, weights_only=True)["global_step"] for path in Path("run").rglob("last.ckpt")}
    assert steps == {2, 4, 6}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_classes_come_from_the_checkpoint(bert, tmp_path, capsys):
    files.jsonl(tmp_path / "c.jsonl", files.classes())
    files.jsonl(tmp_path / "open.jsonl", [{"text": r["text"]} for r in files.classes(5)])
    common = ["--config", str(CONFIGS / "classification.yaml"), f"--model.base={bert}", *SHORT]
    main(["fit", *common, "--data.train=c.jsonl"])
    more = ["--data.train=null", "--data.predict=open.jsonl", f"--ckpt_path={saved('best.ckpt')}"]
    main(["predict", *common, *more])
    rows = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert {row["prediction"] for row in rows} <= {"alpha", "beta", "gamma"}
    with patch.object(distributed, "get_rank", return_value=0):
        write_ranks(read(saved("best.ckpt")), tmp_path / "folder.ckpt")
    main(["predict", *common, *more[:-1], f"--ckpt_path={tmp_path / 'folder.ckpt'}"])
    again = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert again == rows
    said = refused(capsys, "generate", saved("best.ckpt"), "--prompt", "x", code=1)
    assert "is an adapter for SEQ_CLS, which makes no texts: use lightning-lora predict" in said


def test_without_a_checkpoint_it_is_said_that_there_is_no_adapter(llama, data, capsys):
    common = ["--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", *SHORT, f"--data.train={data}"]
    with pytest.warns(UserWarning, match="validate without a checkpoint: no adapter was loaded, so this is the base"):
        main(["validate", *common])
    main(["fit", *common])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no adapter was loaded")
        main(["validate", *common, f"--lora.init_from={saved('best.ckpt')}"])
        said = refused(capsys, "predict", *common, f"--ckpt_path={saved('best.ckpt')}")
    assert "lightning-lora: predict needs a file: give data.predict" in said


@pytest.mark.parametrize(
    ("records", "recipe", "model", "expected"),
    [
        ("classes", "SequenceClassifier", "bert", {}),
        ("preferences", "DPO", "llama", {}),
        ("conversations", "CausalLM", "chat_llama", {}),
        ("prompts", "Seq2SeqLM", "t5", {}),
        ("renamed", "CausalLM", "llama", {"columns": {"prompt": "Question", "response": "answer"}}),
        ("numbers", "SequenceClassifier", "llama", {}),
    ],
)
def test_init_sees_what_a_file_is_for(records, recipe, model, expected, request, tmp_path):
    rows = {
        "renamed": lambda: [{"Question": "q?", "answer": "a"}] * 3,
        "numbers": lambda: [{"text": "t", "label": 0.5}, {"text": "u", "label": 1.0}],
    }.get(records) or getattr(files, records)
    files.jsonl(tmp_path / "a.jsonl", rows())
    main(["init", "a.jsonl", "--model", request.getfixturevalue(model)])
    config = yaml.safe_load(Path("run.yaml").read_text())
    assert config["model"]["class_path"] == f"lightning_lora.recipes.{recipe}"
    assert config["data"].items() >= expected.items()
    assert config["model"]["init_args"].get("regression", False) == (records == "numbers")


def test_init_knows_an_encoder_of_sentences(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "sentences")
    (tmp_path / "sentences" / "modules.json").write_text("[]")
    files.jsonl(tmp_path / "a.jsonl", files.classes())
    main(["init", "a.jsonl", "--model", "sentences"])
    assert yaml.safe_load(Path("run.yaml").read_text())["model"]["init_args"]["pooling"] == "mean"


def test_init_packs_the_base_when_memory_asks_for_it(llama, data):
    from lightning_lora.recipes.starter import look, weigh
    from lightning_lora.recipes.starter_yaml import write_yaml

    seen = look(data, llama)
    enough = weigh(llama, seen, 4)
    assert enough.packed < enough.dense
    assert yaml.safe_load(write_yaml(data, llama, seen, enough, "runs"))["lora"]["quantization"] is None
    short = weigh(llama, seen, 4, available=enough.dense)
    text = write_yaml(data, llama, seen, short, "runs")
    assert "with the base in float32" in text
    assert "too much" not in text
    written = yaml.safe_load(text)["lora"]
    assert (written["quantization"], written["gradient_checkpointing"]) == ("nf4-dq", True)
    assert "too much here even so" in write_yaml(data, llama, seen, weigh(llama, seen, 4, available=1000), "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train=trian.jsonl"], "lightning-lora: trian.jsonl does not exist. Did you mean 'train.jsonl'?"),
        (["--data.val_split=2", "--data.batch_size=0"], "val_split must be in [0, 1), got 2"),
        (["--data.num_workers=-1"], "TextDataModule: num_workers must be a non-negative integer, got -1"),
        (["--config=null.yaml"], "lightning-lora: lora: null says nothing: give its arguments, or leave it out"),
        (["--lora.r=0"], "lightning-lora: LoRA: r must be a positive integer, got 0"),
        (["--lora.lora_alhpa=3"], "unrecognized arguments: --lora.lora_alhpa=3. Did you mean 'lora.lora_alpha',"),
        (["--config=odd.yaml"], "does not accept option 'data.batchsize'. Did you mean 'data.batch_size'"),
        (["--trainer.max_epochs=-3"], "lightning-lora: `max_epochs` must be a non-negative integer or -1"),
        (["--trainer.strategy=foo"], "lightning-lora: trainer: You selected an invalid strategy name"),
        (["--model.base=nowhere"], "no model 'nowhere': neither a folder here nor one of the hub that can be read"),
        (["--model.lr=fast"], "Expected a <class 'float'>. Got value: fast"),
        (["--model.lr=-1"], "lightning-lora: CausalLM: lr must be a positive number, got -1.0"),
        (
            ["--model.generation={num_beamz: 2}"],
            "CausalLM: generation: generate has no 'num_beamz'. Did you mean 'num_beams'",
        ),
        (["--model.generation={num_return_sequences: 2}"], "num_return_sequences=2 gives more than one text for each"),
        (["--model.weight_decay=-1"], "CausalLM: weight_decay must be a number of at least 0, got -1.0"),
        (["--model.lr=.nan"], "CausalLM: lr must be a positive number, got nan"),
        (["--model.max_new_tokens=-3"], "CausalLM: max_new_tokens must be a positive integer, got -3"),
        (["--samples.max_new_tokens=0"], "samples: max_new_tokens must be a positive integer, got 0"),
        (
            ["--model.optimizer=torch.optim.SGD", "--model.lr=1"],
            "CausalLM: lr and weight_decay are those of AdamW: give them to",
        ),
        (["--model.generation={max_new_tokens: 2}"], "generation: max_new_tokens is an argument of its own, beside"),
        (["--model.lrr=1"], "Option 'lrr' is not accepted"),
        (["--model=CasualLM"], "CasualLM"),
        (
            ["--trainer.callbacks={class_path: lightning_lora.AdapterAveraging, init_args: {decay: 7}}"],
            "AdapterAveraging: decay must be in [0, 1)",
        ),
        (["--data.max_length=999"], "max_length=999, but LLAMA sees 256 tokens: give at most 256"),
        (["--ckpt_path=best"], "ckpt_path best: a new process knows no best one: give the file of a checkpoint"),
        (["--samples.every_n_steps=0"], "samples: every_n_steps must be a positive integer, got 0"),
    ],
)
def test_bad_usage_is_one_message(arguments, message, llama, data, capsys):
    Path("odd.yaml").write_text("data: {batchsize: 3}")
    Path("null.yaml").write_text("lora: null")
    own = ["fit", "--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", "--data.train=train.jsonl", *SHORT]
    said = refused(capsys, *own, *arguments)
    assert message.replace("LLAMA", llama) in said
    assert "Traceback" not in said
    assert "usage:" not in said
    assert "Union" not in said
    assert len(said.splitlines()) <= 12


@pytest.mark.parametrize("name", ["lora", "classification"])
@pytest.mark.parametrize("content", ["", "no checkpoint", None])
def test_a_damaged_checkpoint_is_known_before_the_model_is_built(
    name, content, llama, data, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(100)}}, path)
    path.write_bytes(path.read_bytes()[:300] if content is None else content.encode())
    monkeypatch.setattr(Recipe, "configure_model", None)
    config = ["--config", str(CONFIGS / f"{name}.yaml"), f"--model.base={llama}", f"--data.train={data}", *SHORT]
    for stage in ("fit", "validate"):
        said = refused(capsys, stage, *config, f"--ckpt_path={path}", code=1)
        assert f"lightning-lora: {path} can't be read: it is damaged, or no checkpoint" in said
        assert "Traceback" not in said


def test_what_init_and_generate_refuse(llama, data, bert, tmp_path, capsys, monkeypatch):
    assert "absent.jsonl does not exist" in refused(capsys, "init", "absent.jsonl", "--model", llama)
    assert "is no model: it has no config.json" in refused(capsys, "init", data, "--model", str(tmp_path))
    assert "makes no texts: give a causal model" in refused(capsys, "init", data, "--model", bert)
    Path("run.yaml").write_text("mine")
    assert "run.yaml exists: give another -o" in refused(capsys, "init", data, "--model", llama)
    assert Path("run.yaml").read_text() == "mine"
    files.jsonl(tmp_path / "odd.jsonl", [{"colour": "red"}])
    assert "has the columns colour: rename them" in refused(capsys, "init", "odd.jsonl", "--model", llama, "-o", "x")
    assert "nothing does not exist" in refused(capsys, "generate", "nothing", "--prompt", "x", code=1)
    for given in ("", " \n", None):
        monkeypatch.setattr("sys.stdin", None if given is None else io.StringIO(given))
        assert "the prompt is empty: give --prompt TEXT" in refused(capsys, "generate", "nothing")
    assert "the prompt is empty" in refused(capsys, "generate", "nothing", "--prompt", "a", "--prompt", "")
    assert "--temperature must be positive" in refused(capsys, "generate", "x", "--prompt", "x", "--temperature=0")


def test_print_config_round_trip(llama, data, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", "--print_config"])
    assert not caught.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lora"]["r"] == 16
    assert printed["model"]["init_args"]["base"] == llama
    Path("printed.yaml").write_text(yaml.safe_dump(printed))
    main(["fit", "--config", "printed.yaml", *SHORT, f"--data.train={data}"])
    assert saved("best.ckpt")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_help(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        main([stage, "--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"example: lightning-lora {stage} --config run.yaml" in said
    for option in ("--lora.r", "--data.train", "--model CONFIG", "--samples.prompts", "--trainer.max_epochs"):
        assert option in said
    assert "Rank of A and B." in said


def test_the_yaml_of_the_docs(llama, data, tmp_path, capsys):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "docs.yaml").write_text(block)
    main(["fit", "--config", "docs.yaml", *SHORT, f"--model.base={llama}", "--trainer.accumulate_grad_batches=1"])
    assert torch.load(saved(), weights_only=True)["lightning_lora"]["adapters"]["default"]["r"] == 16


def test_a_base_that_can_not_be_loaded_is_one_message(llama, tmp_path, capsys):
    """By ``generate`` and ``latency``: of other shapes than its configuration says, with weights missing, or none."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.save_adapter(model, tmp_path / "adapter")
    odd = shutil.copytree(llama, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    commands = (["generate", str(tmp_path / "adapter"), "--prompt", "x"], ["latency", "--rounds", "1"])
    for changed, why in (
        ({"vocab_size": 330}, "can't be loaded as"),
        ({"num_hidden_layers": 9}, "in none of its files"),
    ):
        (odd / "config.json").write_text(json.dumps({**config, **changed}))
        for command in commands:
            said = refused(capsys, *command, "--base", str(odd))
            assert str(odd) in said
            assert why in said
            assert "Traceback" not in said
    (odd / "config.json").unlink()
    assert "Traceback" not in refused(capsys, *commands[0], "--base", str(odd))
