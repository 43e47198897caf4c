"""Prompt tuning: embeddings of virtual tokens, in front of those of the real ones."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.checks import choice_problems
from lightning_lora.comparators.asked import checked
from lightning_lora.comparators.cache import given_cache, holds_tokens
from lightning_lora.comparators.virtual import (
    computing_dtype,
    count_problems,
    extend_mask,
    forward_names,
    given_to,
    inputs_of,
    one_model,
    place_of,
    reads_first,
    refuse_packed,
    stack_of,
)
from lightning_lora.methods.added import Added
from lightning_lora.methods.method import Addition, MethodConfig, Place, Places, method
from lightning_lora.training.hooks import MethodCallback

_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@method("prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(MethodConfig):
    """How long the prompt is, and what it starts from. The names are PEFT's.

    Args:
        num_virtual_tokens: Tokens in front.
        prompt_tuning_init: ``"RANDOM"``: from a normal distribution, as in PEFT; ``"SAMPLE_VOCAB"``: embeddings of
            random tokens; ``"TEXT"``: those of a text, which is repeated or cut (arXiv:2104.08691, section 3.2).
        prompt_tuning_init_text: That text.
        tokenizer_name_or_path: What makes tokens of it.
        modules_to_save: ``"auto"`` trains new heads in full too; a list names modules; None trains the prompt only.

    Raises:
        ConfigError: With every problem found.
    """

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    num_virtual_tokens: int = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        init: Any = self.prompt_tuning_init
        object.__setattr__(self, "prompt_tuning_init", init.upper() if isinstance(init, str) else init)
        super().__post_init__()

    @override
    @classmethod
    def of_peft(cls, fields: Mapping[str, Any]) -> "PromptTuningConfig":
        return cls(num_virtual_tokens=fields["num_virtual_tokens"])

    @override
    def problems(self) -> Iterable[str]:
        yield from count_problems(self.num_virtual_tokens)
        yield from choice_problems("prompt_tuning_init", self.prompt_tuning_init, _INITS)
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value, needed = getattr(self, name), self.prompt_tuning_init == "TEXT"
            if needed and not (isinstance(value, str) and value):
                yield f"prompt_tuning_init='TEXT' needs {name}, got {value!r}"
            elif not needed and value is not None:
                yield f"{name} has no effect without prompt_tuning_init='TEXT'"

    @override
    def places(self, tree: Mapping[str, Place], heads: Collection[str]) -> Places:
        model, problems = one_model(tree)
        if model is None:
            return Places(problems=problems)
        encoder = model.get_encoder() if model.config.is_encoder_decoder else stack_of(model)
        if "input_ids" not in forward_names(encoder):
            return Places(problems=[f"{type(encoder).__name__} reads no tokens, in front of which a prompt could come"])
        size = encoder.get_input_embeddings().embedding_dim
        # As in PEFT, an encoder's classifier reads the first token there is.
        by_first = model.config.is_encoder_decoder or reads_first(model)
        parts = [self._addition(encoder, tree, "keep" if by_first else "cut", size)]
        if model.config.is_encoder_decoder:
            parts.append(self._addition(model.get_decoder(), tree, "mask", 0))
        return Places(additions=parts)

    def _addition(self, host: Any, tree: Mapping[str, Place], role: str, size: int) -> Addition:
        place, count = place_of(host, tree), self.num_virtual_tokens
        remark = f"{count} virtual tokens" + ("" if size else ", counted in its mask of the encoder's output")
        name, kind = place.name, place.cls.__name__
        return Addition(name=name, type=kind, role=role, size=(size,), parameters=count * size, remark=remark)

    @override
    def build(self, addition: Addition, host: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> Added:
        if addition.role == "mask":
            return EncodersMask(self, seed, dtype, device)
        return Prompt(self, *addition.size, cut=addition.role == "cut", seed=seed, dtype=dtype, device=device)


class Prompt(Added):
    r"""The prompt (arXiv:2104.08691, section 2): the model sees :math:`[P; X]` where it saw embeddings X.

    P is ``embedding`` (tokens, features). What the model makes of it is cut off its output again, so that this is as
    long as the input.

    Args:
        config: The configuration.
        size: Features of an embedding.
        cut: Whether to cut.
        seed: What the first values are drawn from.
        dtype: Dtype of the master copies.
        device: Where to create them.
    """

    config: PromptTuningConfig
    embedding: nn.Parameter

    def __init__(
        self,
        config: PromptTuningConfig,
        size: int,
        *,
        cut: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(config, seed, dtype, device, embedding=(config.num_virtual_tokens, size))
        self.cut, self._in_front = cut, 0
        self.of_the_weights = config.prompt_tuning_init != "RANDOM"

    @override
    def first_values(self, host: Any, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.config.num_virtual_tokens
        if self.config.prompt_tuning_init == "RANDOM":
            return {"embedding": torch.randn(self.embedding.shape, generator=generator)}
        table = host.get_input_embeddings()
        if self.config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(table.num_embeddings, (count,), generator=generator)
        else:
            ids = torch.tensor((_tokens(self.config) * count)[:count])
        return {"embedding": table(ids.to(table.weight.device))}

    @override
    def to_peft(self, root: Any) -> tuple[dict[str, Any], Tensor]:
        config = root.config.get_text_config()
        count, size = self.embedding.shape
        fields = {"num_virtual_tokens": count, "token_dim": size, "num_transformer_submodules": 1}
        fields |= {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
        return {**fields, "prompt_tuning_init": "RANDOM"}, self.embedding

    @override
    def from_peft(self, values: Tensor, fields: Mapping[str, Any]) -> None:
        parts = int(fields.get("num_transformer_submodules") or 1)
        self.take("embedding", values[: len(values) // parts])  # of an encoder's and a decoder's PEFT uses the first

    @override
    def forward(self, samples: int, dtype: torch.dtype) -> Tensor:
        """P for each sample: (samples, tokens, features)."""
        self.require_values()
        return self.embedding.to(dtype).expand(samples, -1, -1)

    @override
    def connect(self, host: nn.Module) -> None:
        host.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)  # a prefix fills the cache
        host.register_forward_hook(self.behind)

    def before(self, host: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The hook: puts the prompt in front when the cache is empty, and counts it in masks and positions."""
        self._in_front = 0
        if not self.active:
            return None
        given, count = given_to(host, args, kwargs), self.config.num_virtual_tokens
        refuse_packed(given)
        extend_mask(given, count)
        if (positions := given.get("position_ids")) is not None:
            positions = given["position_ids"] = positions + count
        if not holds_tokens(given_cache(given)):
            inputs = inputs_of(given)
            embedded = host.get_input_embeddings()(inputs) if given.get("input_ids") is not None else inputs
            own = self(len(inputs), computing_dtype(host)).to(embedded.dtype)
            given |= {"input_ids": None, "inputs_embeds": torch.cat([own, embedded], dim=1)}
            if positions is not None:
                first = torch.arange(count, device=positions.device).expand(*positions.shape[:-1], -1)
                given["position_ids"] = torch.cat([first, positions], dim=-1)
            if (types := given.get("token_type_ids")) is not None:
                given["token_type_ids"] = torch.cat([types.new_zeros(len(types), count), types], dim=1)
            self._in_front = count
        return (), given

    def behind(self, host: Any, args: Any, output: Any) -> Any:
        """The hook: cuts off what came of the prompt."""
        if not self._in_front or not self.cut:
            return None
        if isinstance(output, tuple):
            return (output[0][:, self._in_front :], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, self._in_front :]
        return output


class EncodersMask(Added):
    """What tells a decoder that the encoder's output is longer by the prompt."""

    config: PromptTuningConfig

    @override
    def connect(self, host: nn.Module) -> None:
        host.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The hook: counts the prompt in the mask of the encoder's output."""
        given = given_to(host, args, kwargs)
        if self.active:
            extend_mask(given, self.config.num_virtual_tokens, "encoder_attention_mask")
        return (), given


class PromptTuning(MethodCallback):
    """Turns any Trainer run of one transformers model into prompt tuning (arXiv:2104.08691). The names are PEFT's.

    Args:
        num_virtual_tokens: Tokens in front.
        prompt_tuning_init: ``RANDOM``, ``SAMPLE_VOCAB`` (embeddings of random tokens) or ``TEXT``.
        prompt_tuning_init_text: The text to start from.
        tokenizer_name_or_path: What makes tokens of it.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        adapter_name: Its name in the model and in checkpoints.
        save_peft: Write a PEFT folder beside every checkpoint.

    Raises:
        ConfigError: With everything that is wrong with the arguments.

    Example:
        >>> PromptTuning(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB").config.num_virtual_tokens
        8
    """

    config: PromptTuningConfig

    def __init__(
        self,
        *,
        num_virtual_tokens: int = 20,
        prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM",
        prompt_tuning_init_text: str | None = None,
        tokenizer_name_or_path: str | None = None,
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        adapter_name: str = "prompt",
        save_peft: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "save_peft")}
        config = checked(PromptTuningConfig, **given)
        super().__init__(config, adapter_name, save_peft=save_peft)


def _tokens(config: PromptTuningConfig) -> list[int]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)(config.prompt_tuning_init_text)["input_ids"]
    return [int(token) for token in ids]
