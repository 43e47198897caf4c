"""Every cell of the table in docs/families.md: ``python -m tests.zoo.test_support`` writes it."""

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.zoo.zoo import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("adapted", "LoRA", "DoRA", "4-bit", "merge", "PEFT folder")
YES, NO = "yes", "-"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def row(family: Family) -> dict[str, str]:
    """What holds of a family."""
    model, config = family.make(), ll.LoRAConfig(r=2, lora_alpha=3.0, **family.options)
    plan = ll.plan(model, config)
    experts = sum("Experts" in target.type for target in plan.targets)
    layers = len(plan.targets) - experts
    parts = [f"{layers} layers"] if layers else []
    parts += [f"{experts} stacks of experts"] if experts else []
    trained = adapted(family, False)
    return {
        "adapted": " + ".join(parts),
        "LoRA": YES if trains(*trained) else NO,
        "DoRA": YES if trains(*adapted(family, True)) else NO,
        "4-bit": four_bit(family),
        "merge": YES if merges(*trained) else NO,
        "PEFT folder": travels(family, *trained),
    }


def adapted(family: Family, dora: bool, prepare: Callable[[nn.Module], Any] = lambda model: None) -> Any:
    """The model with an adapter, a batch, and the outputs before it had one."""
    model = family.make().eval()
    prepare(model)
    batch = family.batch(model)
    base = outputs(model, batch)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, use_dora=dora, **family.options))
    torch.testing.assert_close(outputs(model, batch), base, rtol=1e-3, atol=1e-4)
    return model, batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return out.logits if hasattr(out, "logits") else out.logits_per_text


def trains(model: nn.Module, batch: dict[str, Tensor], lr: float = 1e-2) -> bool:
    """Whether the loss falls, every adapter moves, and nothing else does."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    first = {name: p.detach().clone() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=lr)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, p in own.items() if torch.equal(p, first[name])]
    assert not still, still[:3]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert losses[-1] < losses[0], losses
    return True


def merges(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether merging leaves the outputs, and taking it back restores them."""
    expected = outputs(model, batch)
    ll.merge(model)
    torch.testing.assert_close(outputs(model, batch), expected, rtol=1e-3, atol=1e-4)
    ll.unmerge(model)
    assert torch.equal(outputs(model, batch), expected)
    return True


def four_bit(family: Family) -> str:
    try:
        model, batch = adapted(family, False, lambda model: ll.quantize(model, "nf4-dq"))
    except ll.TargetError:
        return NO
    trains(model, batch)
    packed = [layer for _, layer in lora_layers(model) if layer.lora_packed]
    return YES if packed else NO


def travels(family: Family, model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Whether a folder gives the same outputs here, and in PEFT."""
    expected = outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        try:
            ll.save_adapter(model, f"{folder}/adapter")
        except ll.UnsupportedError:
            return NO
        again = family.make().eval()
        ll.load_adapter(again, f"{folder}/adapter")
        torch.testing.assert_close(outputs(again, batch), expected, rtol=1e-3, atol=1e-4)
        theirs = peft.PeftModel.from_pretrained(family.make().eval(), f"{folder}/adapter").eval()
        torch.testing.assert_close(outputs(theirs.base_model.model, batch), expected, rtol=1e-3, atol=1e-4)
    return YES


def line(name: str, cells: dict[str, str]) -> str:
    return f"| {name} | {' | '.join(cells[column] for column in COLUMNS)} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_table_says_of_a_family(name):
    assert line(name, row(FAMILIES[name])) in PAGE.read_text().splitlines()


def test_the_table_has_these_families_and_no_others():
    rows = re.findall(r"^\| (?!family|---)(.+?) \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [*FAMILIES]


def main() -> None:
    """Writes the table."""
    warnings.simplefilter("ignore")
    head = [f"| family | {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * (len(COLUMNS) + 1))} |"]
    lines = []
    for name, family in FAMILIES.items():
        try:
            lines.append(line(name, row(family)))
        except Exception as error:  # to see them all
            lines.append(f"| {name} | FAILED {type(error).__name__}: {str(error)[:300]} |")
        print(lines[-1], flush=True)
    text = PAGE.read_text()
    start, end = "<!-- families: begin -->\n", "<!-- families: end -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    PAGE.write_text(f"{before}{start}{chr(10).join([*head, *lines])}\n{end}{after}")


if __name__ == "__main__":
    main()
