"""Models to compare: each variant is a function from a case to a model that is ready to be trained."""

import copy
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from tests.benchmarks.speed.bound import WithProducts
from tests.benchmarks.speed.cases import DTYPES, TARGETS, Case, Size
from tests.benchmarks.speed.peers import LitGPT, Peer, Torchtune, TorchtuneDoRA, Unsloth, install


def llama(size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    """A Llama with random weights, which are drawn where it is."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.inter,
        vocab_size=size.vocab,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(2048, size.tokens),
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return tf.LlamaForCausalLM(config).to(dtype)


def packed(size: Size, device: str) -> nn.Module:
    """The same in NF4 with double quantisation, by transformers and bitsandbytes."""
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        llama(size, torch.bfloat16, device).cpu().save_pretrained(folder)
        model: nn.Module = tf.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=settings,
            device_map={"": 0 if device == "cuda" else device},
            dtype=torch.bfloat16,
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # An eval forward would repack the weights, and gradients would be wrong from then on. Ours sees to it
            # itself; the floor and PEFT need it.
            module.support_avx512bf16_for_cpu = False
    return model


@lru_cache(maxsize=1)
def _base(size: Size, base: str, device: str) -> nn.Module:
    model = packed(size, device) if base == "nf4-dq" else llama(size, DTYPES[base], device)
    return model.requires_grad_(False)


def base(case: Case) -> nn.Module:
    """The frozen base, a copy of the caller's own, in train mode."""
    return copy.deepcopy(_base(case.size, case.base, case.device)).train()


def build(variant: str, case: Case) -> nn.Module:
    """A variant of the whole model."""
    return VARIANTS[variant](base(case), case)


def floor(model: nn.Module, case: Case) -> nn.Module:
    """The frozen base whose backward pass ends at the outputs of the first adapted layers.

    An adapter needs the gradient of its layer's output. So this is what no adapter can do without; its own products
    are not in it.
    """

    def watch(layer: nn.Module) -> None:
        def begin(_: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                handle.remove()  # a layer before it is adapted
            elif torch.is_grad_enabled():
                output.requires_grad_()

        handle = layer.register_forward_hook(begin)

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            watch(module)
    return model


def full(model: nn.Module, case: Case) -> nn.Module:
    """The base, trained in full."""
    return model.requires_grad_(True)


def ours(model: nn.Module, case: Case) -> nn.Module:
    """Adapters of this package, with float32 masters as ever."""
    ll.inject(model, ll.LoRAConfig(**ours_options(model, case)))
    return fill(model)


def ours_options(model: nn.Module, case: Case) -> dict[str, Any]:
    """What our config and our callback are called with."""
    where = {"dora_dropout": "lora"} if case.low_rank else {}
    return {**_options(model, case), **where, "modules_to_save": None}


def _options(model: nn.Module, case: Case) -> dict[str, Any]:
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {
        "r": case.r,
        "lora_alpha": case.lora_alpha,
        "lora_dropout": case.dropout,
        "use_dora": case.dora,
        "target_modules": [name for name in TARGETS if name in there],
    }


def peft(model: nn.Module, case: Case, autocast_adapter_dtype: bool = True) -> nn.Module:
    """PEFT's adapters: in float32 by default, else in the dtype of the base."""
    config = LoraConfig(**_options(model, case))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    if not autocast_adapter_dtype:
        for parameter in wrapped.parameters():  # on a packed base they would stay in float32
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[case.base])
    return fill(wrapped.train())


def of_peer(peer: type[Peer], model: nn.Module, case: Case) -> nn.Module:
    """A reference of another library."""
    return fill(install(model, peer, case))


VARIANTS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "floor": floor,
    "ours": ours,
    "ours eager": ours,  # and its steps without our kernels: see steps.around
    "PEFT": peft,
    "PEFT bf16": partial(peft, autocast_adapter_dtype=False),
    "torchtune": lambda model, case: of_peer(TorchtuneDoRA if case.dora else Torchtune, model, case),
    "LitGPT": partial(of_peer, LitGPT),
    "unsloth": partial(of_peer, Unsloth),
    "full": full,
    "products": lambda model, case: WithProducts(floor(model, case), case),
}


def parameters(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A, B and the magnitude, if any, of each adapted layer, by the layer's name in the base."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            (adapter,) = module.lora.values()
            found = dict(adapter.named_parameters())
        elif isinstance(module, LoraLayer):
            magnitudes = module.lora_magnitude_vector
            found = {"A": module.lora_A["default"].weight, "B": module.lora_B["default"].weight}
            found |= {"magnitude": magnitudes["default"].weight} if magnitudes else {}
        elif isinstance(module, Peer):
            found = dict(module.named_parameters(recurse=False))
        else:
            continue
        yield name.removeprefix("base_model.model."), found


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Gives the variants the same A and B, which isn't 0, and magnitudes that differ from the norms."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    for name, found in parameters(model):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = {}
        for key in ("A", "B"):
            draw = torch.randn(found[key].shape, generator=generator, dtype=torch.float64)
            values[key] = draw * (0.01 if key == "B" else found[key].shape[1] ** -0.5)
        if "magnitude" in found:
            draw = torch.rand(found["magnitude"].shape, generator=generator, dtype=torch.float64)
            values["magnitude"] = found["magnitude"].double().cpu() * (0.9 + 0.2 * draw)
        if name in adapters:
            for adapter in adapters[name].lora.values():
                adapter.take(values)  # what derives from the values is told
        else:
            for key, value in values.items():
                found[key].copy_(value)
    return model
