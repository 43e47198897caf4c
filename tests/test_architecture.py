"""Imports point one way, and what is public is what is said to be."""

import ast
import graphlib
from pathlib import Path

import pytest

import lightning_lora as ll

PACKAGE = Path(ll.__file__).parent
# From below to above: a module imports only from its own level and from levels before it.
LEVELS = [
    {"errors", "names", "lightning_packages", "patches", "tables"},
    {"marks"},
    {"checks"},
    {"config"},
    {"arguments"},
    {"ops"},
    {"quantization", "adapters", "inits"},
    {"layers"},
    {"methods"},
    {"targets"},
    {"injection"},
    {"quantize", "switching"},
    {"state"},
    {"merging", "adopting"},
    {"optim"},
    {"formats"},
    {"composing"},
    {"from_data"},
    {"loading"},
    {"files", "recompute"},
    {"analysis"},
    {"strategies"},
    {"training"},
    {"callback", "monitor", "averaging"},
    {"comparators"},
    {"demo"},
    {"recipes"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("lightning_lora.")}
        found |= {"__init__" for name in names if name == "lightning_lora"}
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_one_way(path):
    own = part(path)
    assert own in LEVEL, f"give {own} a level"
    above = {name for name in imports(path) if name != own and LEVEL[name] >= LEVEL[own]}
    assert not above, f"{own} may not import {above}"


def files_imported(path: Path) -> set[Path]:
    """The files of this package that a file imports, wherever in it, but for types only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = {file_of(alias.name) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names}
    return {path for path in found if path is not None}


def file_of(module: str) -> Path | None:
    place = PACKAGE.parent / module.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path in FILES), None)


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({path: files_imported(path) for path in FILES}).prepare()


BELOW_LIGHTNING = [p for p in FILES if LEVEL[part(p)] < LEVEL["strategies"] and part(p) != "lightning_packages"]


@pytest.mark.parametrize("path", BELOW_LIGHTNING, ids=[str(p.relative_to(PACKAGE)) for p in BELOW_LIGHTNING])
def test_only_the_upper_levels_know_lightning(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in names)


def at_import(path: Path, seen: set[Path]) -> set[str]:
    """Other packages that a file, and files of this package that it imports, import as soon as it is imported."""
    seen.add(path)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            own = file_of(module) or file_of(module.rpartition(".")[0])
            if own is None:
                found.add(module.split(".")[0])
                continue
            for each in {own, own.parent / "__init__.py"} - seen:
                found |= at_import(each, seen)
    return found


@pytest.mark.parametrize("name", ["__init__.py", "cli.py"])
def test_lightning_is_imported_where_there_is_a_trainer_only(name):
    """It takes longer than all the rest: a command, or a loop of one's own, starts without it."""
    packages = at_import(PACKAGE / name, set())
    assert "torch" in at_import(PACKAGE / "__init__.py", set())
    assert not packages & {"lightning", "pytorch_lightning", "torchmetrics", "transformers", "bitsandbytes"}
    assert "lightning" in at_import(PACKAGE / "callback.py", set())


def test_names_are_the_same_however_they_are_imported():
    from lightning_lora import LoRA, callback

    assert ll.LoRA is LoRA is callback.LoRA
    assert {"LoRA", "comparators"} <= set(dir(ll))
    with pytest.raises(AttributeError, match="no attribute 'LORA'"):
        _ = ll.LORA


def test_only_one_file_assigns_classes():
    def assigns(path: Path) -> bool:
        targets = [t for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assign) for t in n.targets]
        return any(isinstance(t, ast.Attribute) and t.attr == "__class__" for t in targets)

    assert [p.name for p in FILES if assigns(p)] == ["swap.py"]


def test_what_layers_gain_can_hide_nothing_of_the_users():
    from lightning_lora.layers.registry import _KINDS

    for mixin in _KINDS.values():
        for cls in mixin.__mro__[:-1]:
            public = {name for name in vars(cls) if not name.startswith("_")}
            assert all(name.startswith("lora_") for name in public - {"forward", "extra_repr"}), cls


def test_files_hold_one_concept():
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 270}
    assert not long


def test_all_is_complete_sorted_and_public():
    assert ll.__all__ == sorted(ll.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = [alias.name for node in imports if node.module.startswith(ll.__name__) for alias in node.names]
    assert sorted(imported) == ll.__all__
    assert all(getattr(ll, name).__doc__ for name in ll.__all__)


def test_signatures_of_the_contract():
    """Names and defaults as the design has them."""
    import inspect

    parameters = inspect.signature(ll.LoRA).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert defaults == {
        "r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": None,
        "target_parameters": None,
        "layers_to_transform": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "use_rslora": False,
        "use_dora": False,
        "dora_dropout": "input",
        "dropout_mask": "joint",
        "init_lora_weights": "kaiming",
        "bias": "none",
        "train_norms": False,
        "modules_to_save": "auto",
        "trainable_token_indices": None,
        "loraplus_lr_ratio": None,
        "quantization": None,
        "gradient_checkpointing": False,
        "adapter_name": "default",
        "adapter_dtype": "float32",
        "init_from": None,
        "save_peft": False,
        "sync_base": False,
        "shard_adapters": None,
        "save_sharded": False,
    }
    config = {name: p.default for name, p in inspect.signature(ll.LoRAConfig).parameters.items()}
    assert config == {name: defaults[name] for name in list(defaults)[:18]}
    assert str(inspect.signature(ll.inject)).startswith("(model: ")
    for function, names in {
        ll.plan: ["model", "config"],
        ll.inject: ["model", "config", "adapter_name"],
        ll.eject: ["model"],
        ll.adapters: ["model"],
        ll.set_adapter: ["model", "adapters"],
        ll.disable_adapters: ["model"],
        ll.delete_adapter: ["model", "adapter_name"],
        ll.combine_adapters: ["model", "weights", "adapter_name", "method", "rank"],
        ll.merge: ["model", "adapter_names", "dtype"],
        ll.unmerge: ["model"],
        ll.merge_and_unload: ["model", "dequantize"],
        ll.save_adapter: ["model", "folder", "adapter_name"],
        ll.load_adapter: ["model", "source", "adapter_name"],
        ll.adapter_state_dict: ["model", "adapter_name"],
        ll.load_from_checkpoint: ["module_class", "path", "init_kwargs"],
        ll.summary: ["model"],
        ll.estimate_memory: [
            "model",
            "config",
            "quantization",
            "optimizer",
            "batch_size",
            "seq_len",
            "strategy",
            "devices",
        ],
    }.items():
        found = inspect.signature(function).parameters.values()
        assert [p.name for p in found if p.kind is not p.KEYWORD_ONLY] == names
