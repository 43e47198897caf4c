"""The bytes of one training step, of one way to train a model."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_lora.analysis.memory_copy import pack, shape_copy
from lightning_lora.analysis.memory_count import Step, counted, frozen_bytes
from lightning_lora.analysis.memory_inputs import as_shapes, likely_batch, loss_of, one_text_per_row, transformers_model
from lightning_lora.analysis.memory_trace import on_shapes, trace
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import ConfigError, LightningLoRAError, TargetError, UnsupportedError, first_line, raise_all
from lightning_lora.injection.freeze import train_mode
from lightning_lora.injection.inject import carry_out
from lightning_lora.layers import lora_layers
from lightning_lora.patches import Patches, quiet
from lightning_lora.quantize import quantizable
from lightning_lora.recompute import checkpoint_activations, checkpoint_transformers
from lightning_lora.targets import draft

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train a model, as far as it changes what a step computes.

    Args:
        config: The adapters; None trains the whole model.
        quantization: How the base is quantised.
        batch_size: Samples.
        seq_len: Tokens of each.
        gradient_checkpointing: Whether blocks run again in the backward pass.
        precision: As a Trainer's; None leaves dtypes as they are.
        attn_implementation: As in transformers; None leaves it as it is.
    """

    config: LoRAConfig | None
    quantization: Quantization | None = None
    batch_size: int = 1
    seq_len: int = 1024
    gradient_checkpointing: bool = False
    precision: str | None = None
    attn_implementation: str | None = None


def follow(model: nn.Module, way: Way, example_inputs: Any = None) -> Step:
    """Follows one training step on shapes alone. Nothing is allocated, and the model is only read.

    Args:
        model: The model, without adapters.
        way: How it is trained.
        example_inputs: A batch as its forward takes it; of a transformers model a likely one by default.

    Raises:
        ConfigError, TargetError: As `lightning_lora.inject` and `lightning_lora.quantize` do.
        UnsupportedError: If the model can't be copied, or its forward not be followed on shapes.
    """
    step: Step = on_shapes(functools.partial(_follow, model, way, example_inputs))
    return step


def _follow(model: nn.Module, way: Way, example_inputs: Any, mode: FakeTensorMode) -> Step:
    dtype, autocast = _dtypes(way.precision)
    copied = shape_copy(model, dtype)
    net, packed = copied.model, copied.packed
    if way.config is None:
        net.requires_grad_(True)
        if packed or way.quantization is not None:
            raise ConfigError("packed weights can't be trained in full: give the dense model, and no quantization")
    else:
        _adapt(net, way.config)
    dense, largest = frozen_bytes(net), 0
    with torch.no_grad():
        for name, (settings, unpacked) in packed.items():
            pack(net.get_submodule(name), settings, unpacked)
        if way.quantization is not None:
            for node in quantizable(net, way.quantization):
                weight: Any = node.module.weight
                largest = max(largest, weight.nbytes)
                pack(node.module, way.quantization, weight.dtype)
    root = transformers_model(net)
    run = net if root is None or example_inputs is not None else root
    if example_inputs is None:
        if root is None:
            raise ConfigError(
                f"what {type(model).__name__} is given is not known: give example_inputs, a batch as its forward "
                "takes it (its values don't matter)"
            )
        example_inputs = likely_batch(root, way.batch_size, way.seq_len)
    batch = as_shapes(example_inputs, dtype)
    inputs = sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    if root is not None:
        _prepare(root, way)
    if way.config is not None:
        train_mode(net, [_ADAPTER])
    patches = Patches()
    try:
        if way.gradient_checkpointing and way.config is not None:
            checkpoint_activations(net, patches)
        elif way.gradient_checkpointing:
            _checkpoint_all(root, patches)
        # what is said of shapes is said of no run, and errors are raised
        with one_text_per_row(), quiet("bitsandbytes", "torch._subclasses.fake_tensor"):
            seen = trace(net, loss_of(run, batch), autocast, inputs)
    except LightningLoRAError:
        raise
    except Exception as error:  # whatever a forward may raise
        raise UnsupportedError(
            f"a forward and backward pass of {type(run).__name__} could not be followed on shapes "
            f"({type(error).__name__}: {first_line(error)}): give "
            "example_inputs that fit it; a forward that looks at values can't be followed"
        ) from error
    finally:
        patches.release()
    return counted(net, dense, largest, seen)


def _checkpoint_all(root: Any, patches: Patches) -> None:
    if not getattr(root, "supports_gradient_checkpointing", False):
        raise ConfigError("gradient_checkpointing: to train a whole model with it is known of transformers models only")
    checkpoint_transformers(root, patches)


def _dtypes(precision: str | None) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype that a model is cast to, and that of autocast, for a precision of Lightning's."""
    if precision is None:
        return None, None
    bits, _, kind = precision.partition("-")
    return (DTYPES[bits], None) if kind == "true" else (None, DTYPES[bits])


def _adapt(net: nn.Module, config: LoRAConfig) -> None:
    plan, problems = draft(net, config)
    raise_all(TargetError, problems, "LoRA")
    carry_out(net, config, plan, _ADAPTER)
    for _, layer in lora_layers(net):
        for each in layer.lora_adapters().values():
            adapter: Any = each
            adapter.initialised = True  # what its values are changes no shape


def _prepare(root: Any, way: Way) -> None:
    if way.gradient_checkpointing:
        root.config.use_cache = False  # as transformers does it itself then, with a warning
    if (attn_implementation := way.attn_implementation) is not None:
        try:
            root.set_attn_implementation(attn_implementation)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"attn_implementation={attn_implementation!r}: {error}") from error
