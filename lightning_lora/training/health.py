"""A run cannot silently fail to train.

Before the first step `check_before` refuses what could not train, and in the first ones `lightning_lora.training.watch`
looks at every tensor that should: it must get a gradient, and it must move. Behind epochs and validations `check_again`
and `lightning_lora.training.second_look` do so again.
"""

from collections.abc import Collection, Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import DeadAdapterError, listing, raise_all
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.marks import MERGED, merged_layers
from lightning_lora.methods.active import active_adapters
from lightning_lora.methods.active import adapter_names as names_of
from lightning_lora.methods.added import added_modules
from lightning_lora.optim import held_by, require_trained
from lightning_lora.state import trained_parameters
from lightning_lora.targets.probe import bypass
from lightning_lora.targets.walk import nodes

_NOTES = {
    "does not require grad": "only the adapters need gradients, and none reached the loss. If the layers lie in a "
    "reentrant activation checkpoint, use torch.utils.checkpoint with use_reentrant=False.",
    "backward through the graph a second time": "layers that a module calls with the same input are one step for "
    "autograd: give all backward passes over them but the last retain_graph=True.",
    "Muon only supports 2D parameters": "parameters() has what is frozen too: give Muon [p for p in self.parameters() "
    "if p.requires_grad and p.ndim == 2]. Vectors that are trained (DoRA's magnitudes, biases, norms) need a second "
    "optimizer.",
    "SparseAdam does not support dense gradients": "those of adapters are dense, on an embedding with sparse=True too: "
    "give them to another optimizer.",
}


def check_before(
    model: nn.Module, optimizers: list[Optimizer], adapter_names: Collection[str], switches: bool = False
) -> None:
    """Refuses a run in which something could not train.

    Args:
        model: The model.
        optimizers: Its optimizers.
        adapter_names: The adapters that the run trains; others may be there, frozen.
        switches: Whether the run itself makes adapters active: then not all of them are at any moment.

    Raises:
        DeadAdapterError: Naming the layers and the way out.
    """
    problems = []
    if merged := merged_layers(model):
        problems.append(f"adapters are merged into {listing(merged)} and would get no gradient: call ll.unmerge(model)")
    held = [(name, layer, *item) for name, layer in lora_layers(model) for item in layer.lora_adapters().items()]
    for name, layer, adapter_name, adapter in held:
        if adapter_name in adapter_names:
            if adapter.scaling == 0:
                problems.append(f"adapter {adapter_name!r} on {name} has scaling 0")
            if not switches and adapter_name not in layer.lora_active and MERGED not in vars(layer):
                problems.append(f"adapter {adapter_name!r} on {name} is not active and would get no gradient")
    idle = [added for added in added_modules(model) if added.adapter_name in adapter_names and not added.module.active]
    problems += [f"adapter {added.adapter_name!r} is not active and would get no gradient" for added in idle[:1]]
    adapted = [node for node in nodes(model).values() if isinstance(node.module, LoRALayer)]
    problems += [f"{node.name}: {why}" for node in adapted if (why := bypass(node))]
    expected = adapter_names if not switches else [name for name in active_adapters(model) if name in adapter_names]
    if frozen := [name for name, p in trained_parameters(model, expected) if not p.requires_grad]:
        problems.append(f"requires_grad was turned off on {listing(frozen, 4)}: freeze before adapters are added")
    raise_all(DeadAdapterError, problems, "the adapters could not train")
    others = [name for name in names_of(model) if switches and name not in adapter_names]
    require_trained(model, optimizers, [id(p) for _, p in trained_parameters(model, others)])


def check_again(
    model: nn.Module, optimizers: list[Optimizer], trained: Mapping[str, nn.Parameter], began_with: Collection[str]
) -> None:
    """Refuses to go on where a run has changed the model so that what was trained can't be any more.

    Args:
        model: The model.
        optimizers: Its optimizers.
        trained: What is to be trained, by name, now.
        began_with: The names as training began.

    Raises:
        DeadAdapterError: Naming the layers and the way out.
    """
    problems, held = [], held_by(optimizers)
    if merged := merged_layers(model):
        problems.append(f"adapters were merged into {listing(merged)}: call ll.unmerge before training goes on")
    if gone := [name for name in began_with if name not in trained]:
        problems.append(f"{listing(gone, 4)}: not in the model any more. Replace layers before adapters are added")
    if new := [name for name, p in trained.items() if p.requires_grad and id(p) not in held]:
        problems.append(
            f"{listing(new, 4)}: taken out of the optimizer, or another tensor than the optimizer has. Copy values "
            "into what is there, and turn requires_grad off on what is to rest"
        )
    raise_all(DeadAdapterError, problems, "what was trained can't be trained any more")


def explain(exception: BaseException) -> None:
    """Adds to an exception of torch what it most likely means here."""
    for words, note in _NOTES.items() if isinstance(exception, (RuntimeError, ValueError)) else ():
        if words in str(exception):
            exception.add_note(f"lightning_lora: {note}")
