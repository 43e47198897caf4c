"""Tokenizers by the name of their model, and what is wrong with them, without the model itself."""

from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError, first_line, listing, raise_all

DEMO = Path(__file__).parents[1] / "demo" / "base"  # a language model of 1 M parameters, over bytes
LONGEST = 2048  # tokens of an example, where neither the user nor the model says less


def resolve(base: str) -> str:
    """The folder or hub id that a name stands for: ``demo`` is the model in this package."""
    return str(DEMO) if base == "demo" and not Path(base).exists() else base


def load_config(base: str) -> Any:
    """The configuration of a model.

    Raises:
        ConfigError: If there is none: absent, gated, or no model at all.
    """
    from transformers import AutoConfig

    folder = Path(base := resolve(base))
    if folder.is_dir() and not (folder / "config.json").exists():
        held = listing(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ConfigError(f"{base} is no model: it has no config.json (found: {held})")
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(_absent("model", base, error)) from error


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: If there is none, or it can't tell which characters a token stands for.
    """
    from transformers import AutoTokenizer

    base = resolve(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # transformers raises many kinds, for files of many kinds
        raise ConfigError(_absent("tokenizer", base, error)) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {base} is a slow one: save it as tokenizer.json with save_pretrained first"
        )
    return tokenizer


def check_pair(base: str, tokenizer: Any, config: Any) -> None:
    """Checks that a tokenizer is one for a model.

    Raises:
        ConfigError: If it has tokens that the model has no row for.
    """
    text = config.get_text_config()
    size, vocabulary = len(tokenizer), getattr(text, "vocab_size", None)
    problems = []
    if vocabulary is not None and size > vocabulary:
        problems.append(
            f"the tokenizer of {base} has {size:,} tokens, the model {vocabulary:,}: "
            "they don't belong together, or tokens were added: give the model's own, or resize its embeddings"
        )
    raise_all(ConfigError, problems)


def set_padding(tokenizer: Any, base: str, pad_token: str | None, who: str | None) -> None:
    """Has a tokenizer pad with the token that was asked for.

    Args:
        tokenizer: That of the base.
        base: The model.
        pad_token: One of its tokens; None for the tokenizer's own.
        who: What can't do without one.

    Raises:
        ConfigError: If there is no such token, or none where one is needed.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ConfigError(f"pad_token {pad_token!r} is none of the tokens of {base}")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None and who is not None:
        raise ConfigError(
            f"the tokenizer of {base} has no pad_token, which {who} needs to find where a text ends: name one of its "
            "tokens (data.pad_token)"
        )


def open_tokenizer(
    base: str, recipe: Any, max_length: int | None, pad_token: str | None, who: str | None
) -> tuple[Any, int]:
    """The tokenizer of a recipe, or else of a base, and how many tokens an example may have.

    Raises:
        ConfigError: With what is wrong with them, see `check_pair`, `set_padding` and `check_length`.
    """
    config = load_config(base)
    tokenizer = load_tokenizer(base) if recipe is None else recipe.tokenizer
    check_pair(base, tokenizer, config)
    set_padding(tokenizer, base, pad_token, who)
    return tokenizer, check_length(max_length, context_of(config, tokenizer), base)


def filler_of(tokenizer: Any) -> int:
    """The token to fill rows with. Padding has no label and no attention, so any will do where there is none for it."""
    pad = tokenizer.pad_token_id
    return (tokenizer.eos_token_id if pad is None else pad) or 0


def context_of(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model can see, if it says so."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length")]
    # RoBERTa counts positions from pad_token_id + 1, and only its tokenizer knows
    own = tokenizer.model_max_length
    known = [n for n in [*limits, own if own < 1 << 30 else None] if isinstance(n, int) and n > 0]
    return min(known) if known else None


def check_length(max_length: int | None, context: int | None, base: str) -> int:
    """How long examples may be.

    Raises:
        ConfigError: If the model can't see as much as was asked for.
    """
    if max_length is None:
        return min(context or LONGEST, LONGEST)
    if context is not None and max_length > context:
        raise ConfigError(f"max_length={max_length}, but {base} sees {context} tokens: give at most {context}")
    return max_length


def _absent(what: str, base: str, error: Exception) -> str:
    reason = first_line(error)
    folder = Path(base)
    if folder.is_dir():
        held = listing(sorted(p.name for p in folder.iterdir()), 12) or "nothing"
        return f"no {what} in {base} (found: {held}): {reason}"
    return f"no {what} {base!r}: neither a folder here nor one of the hub that can be read ({reason})"
