"""LoRA and DoRA as a callback."""

import os
from typing import Literal

import torch

from lightning_lora.arguments import check_arguments
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import ConfigError
from lightning_lora.inits import Init
from lightning_lora.strategies import Options
from lightning_lora.training.hooks import MethodCallback


class LoRA(MethodCallback):
    r"""Turns any Trainer run into a LoRA or DoRA run.

    When a run is set up, it adds low-rank adapters to the model (built in ``__init__``, ``setup`` or
    ``configure_model``), freezes the rest, and sees to it that optimizers hold, and checkpoints contain, exactly what
    is trained: see `LoRAConfig`. Put it before callbacks that copy the model.

    Args:
        r: Rank of A and B.
        lora_alpha: Scale of the update, before it is divided by r.
        lora_dropout: Probability of dropout on the adapter's input.
        target_modules: ``all-linear``, ``attention``, ``mlp``, a regex, or a list of suffixes, globs and ``re:...``.
        exclude_modules: The same forms.
        target_parameters: Names of parameters that are read, not called.
        layers_to_transform: Indices of the blocks to adapt, or a mapping from a tower to its indices.
        rank_pattern: Ranks that differ from r, by pattern; or ``auto``: spread by data.
        alpha_pattern: Values that differ from lora_alpha, by pattern.
        use_rslora: Scale by the square root of r.
        use_dora: Train the magnitude of each output row too.
        dora_dropout: ``input`` as in PEFT, or ``lora``: on the low-rank branch only.
        dropout_mask: ``joint``: layers with the same input may share one; or ``module``, as in PEFT.
        init_lora_weights: ``kaiming``, ``orthogonal``, ``pissa``, ``eva`` and others, or an Init object with options.
        bias: Which biases are trained: ``none``, ``all`` of the model, or ``lora_only``: those of adapted layers.
        train_norms: Train the weights and biases of LayerNorm, RMSNorm and GroupNorm in full too.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        trainable_token_indices: Rows of the token embedding to train.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+).
        quantization: How to quantise the frozen base.
        gradient_checkpointing: Recompute activations in the backward pass.
        adapter_name: Key of this adapter in the model and in checkpoints.
        adapter_dtype: Dtype of the master copies of A, B and magnitude; products follow the input's dtype.
        init_from: A PEFT folder, a checkpoint of adapters or a hub id to start from, unless the run is resumed.
        save_peft: Write a PEFT folder beside every checkpoint: ``epoch=0.peft`` beside ``epoch=0.ckpt``.
        sync_base: Let rank 0 send its base to the other ranks, which otherwise have to load the same one.
        shard_adapters: Shard adapters too, under ModelParallelStrategy; by default if they are large.
        save_sharded: Under FSDP, write checkpoints as folders in which each rank has its part.

    Raises:
        ConfigError: With everything that is wrong with the arguments.

    Example:
        >>> LoRA(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).config.r
        16
    """

    config: LoRAConfig

    def __init__(
        self,
        *,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        target_parameters: str | list[str] | None = None,
        layers_to_transform: int | list[int] | dict[str, list[int]] | None = None,
        rank_pattern: dict[str, int] | Literal["auto"] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        dora_dropout: Literal["input", "lora"] = "input",
        dropout_mask: Literal["joint", "module"] = "joint",
        init_lora_weights: str | Init = "kaiming",
        bias: Literal["none", "all", "lora_only"] = "none",
        train_norms: bool = False,
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        loraplus_lr_ratio: float | None = None,
        quantization: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | Quantization | None = None,
        gradient_checkpointing: bool = False,
        adapter_name: str = "default",
        adapter_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        init_from: str | os.PathLike[str] | None = None,
        save_peft: bool = False,
        sync_base: bool = False,
        shard_adapters: bool | None = None,
        save_sharded: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        own = {name: given.pop(name) for name in list(given) if name not in LoRAConfig.__dataclass_fields__}
        error: ConfigError | None = None
        try:
            config = LoRAConfig(**given)
        except ConfigError as raised:
            error = raised
        check_arguments(own, error)
        super().__init__(
            config,
            adapter_name,
            dtype=getattr(torch, adapter_dtype),
            init_from=init_from,
            save_peft=save_peft,
            options=Options(sync_base, shard_adapters, save_sharded),
        )
        self.loraplus_lr_ratio, self.gradient_checkpointing = loraplus_lr_ratio, gradient_checkpointing
        self.quantization = None if quantization is None else Quantization.of(quantization)
