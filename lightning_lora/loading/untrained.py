"""What a file has in full, and the adapter that it is loaded into does not train."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.injection.copies import tensors_of, values_of
from lightning_lora.marks import TRAINED
from lightning_lora.targets.walk import Node


def not_trained(
    stored: StoredAdapter,
    tree: Mapping[str, Node],
    config: LoRAConfig,
    adapter_name: str,
    brought: Mapping[str, Tensor],
) -> Iterator[str]:
    """Why the checkpoints of the model's adapter would not fit the file, and what to ask for.

    Args:
        stored: What the file has.
        tree: The modules of the model.
        config: The configuration of its adapter.
        adapter_name: Its name.
        brought: The tensors of the model that the file has in full, by name.
    """
    trained, owners = set[int](), dict[int, str]()
    for node in tree.values():
        own = tensors_of(node.module)
        trained |= {id(own[key]) for key, _ in values_of(node.module, adapter_name)}
        owners |= {id(own[key]): name for key, name in vars(node.module).get(TRAINED, {}).items() if key in own}
    frozen = {*stored.tables}
    odd = {key: tensor for key, tensor in brought.items() if id(tensor) not in trained and key not in frozen}
    if not odd:
        return
    what = f"the file has {listing(odd, 3)} in full, which the model's adapter {adapter_name!r} does not train"
    if others := list(dict.fromkeys(owners[id(tensor)] for tensor in odd.values() if id(tensor) in owners)):
        yield (
            f"{what}, since adapter {others[0]!r} has it: before the run call "
            f"ll.load_adapter(model, {stored.source!r}, {adapter_name!r}) and ll.set_adapter(model, {adapter_name!r}), "
            "and leave out init_from: then each has its own"
        )
        return
    said = {**stored.fields, **(stored.entry.get("config") or {})}
    asked = {key: said.get(key) for key in ("modules_to_save", "bias", "train_norms")}
    differ = [f"{k}={v!r}" for k, v in asked.items() if v not in (None, "none", False, getattr(config, k))]
    yield f"{what}: ask for the same ({', '.join(differ) or 'name it in modules_to_save'})"
