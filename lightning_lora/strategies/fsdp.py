"""FSDPStrategy (FSDP1): the frozen base in flat parameters, and what is trained beside them."""

from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.errors import ConfigError, UnsupportedError, listing
from lightning_lora.names import clean
from lightning_lora.ops.sharded import is_fsdp_wrapper
from lightning_lora.patches import Patches
from lightning_lora.state import moving_tensors
from lightning_lora.strategies.agreement import send_trained
from lightning_lora.strategies.registry import handles
from lightning_lora.strategies.sharded import ShardedAdapter


@handles("FSDPStrategy")
class FSDPAdapter(ShardedAdapter):
    """Trained parameters are ignored by FSDP and whole on every rank.

    A flat parameter that is trained in part has a gradient of full size, base and all; and it takes one dtype, where
    adapters are float32 and the base is not. Without them each flat parameter is frozen and of one dtype.
    """

    @override
    def prepare(self, model: nn.Module, patches: Patches) -> None:
        super().prepare(model, patches)
        kwargs: dict[str, Any] = self.strategy.kwargs
        if not kwargs.get("use_orig_params", True):
            raise ConfigError("FSDPStrategy(use_orig_params=False) can't be used with adapters: leave it out")
        if self.options.shard_adapters:
            raise UnsupportedError(
                "shard_adapters: FSDPStrategy keeps them whole; ModelParallelStrategy can shard them"
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ignored = _ignored(kwargs)
        patches.replace(
            self.strategy,
            "kwargs",
            {
                **{key: value for key, value in kwargs.items() if key != "ignored_modules"},
                "ignored_states": [*ignored, *(p for p in trained if all(p is not other for other in ignored))],
            },
        )
        send_trained(moving_tensors(model), self.strategy.root_device)

    @override
    def settle_base(self, model: nn.Module, quantization: str | None) -> None:
        if wrapped := [clean(n) or "the model" for n, m in model.named_modules() if is_fsdp_wrapper(m)]:
            raise UnsupportedError(
                f"{listing(wrapped, 3)}: wrapped in FullyShardedDataParallel before adapters came, so that no rank has "
                "the whole weights. Give FSDPStrategy an auto_wrap_policy instead of wrapping in configure_model; "
                "for another run build the module anew"
            )
        super().settle_base(model, quantization)

    @override
    def is_reduced(self, parameter: nn.Parameter) -> bool:
        return False


def _ignored(kwargs: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters that the user wants FSDP to ignore."""
    states = [*(kwargs.get("ignored_states") or ()), *(kwargs.get("ignored_modules") or ())]
    nested = [list(s.parameters()) if isinstance(s, nn.Module) else [s] for s in states]
    return [parameter for parameters in nested for parameter in parameters]
