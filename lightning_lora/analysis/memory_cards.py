"""How much memory cards have."""

import re

from lightning_lora.errors import did_you_mean

GIB = 1 << 30
RESERVE = GIB  # of a card: the CUDA context, workspaces of cuBLAS, and what the allocator rounds up; an assumption

CARDS = {
    "t4": 16,
    "v100": 32,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "a10": 24,
    "l4": 24,
    "a100-40gb": 40,
    "a6000": 48,
    "l40s": 48,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "mi300x": 192,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|g)?")


def card_bytes(card: object) -> int | None:
    """The memory of a card: a number of GiB, a text like ``"24GiB"`` (or GB, by which cards are sold), or a name.

    None if it is none of these.
    """
    if isinstance(card, bool) or not isinstance(card, (int, float, str)):
        return None
    text = str(card).strip().lower()
    if (known := CARDS.get(text.replace(" ", "").replace("_", "-"))) is not None:
        return known * GIB
    match = _SIZE.fullmatch(text)
    size = float(match[1]) if match else 0.0
    return int(size * GIB) if size > 0 else None


def card_problem(card: object) -> str | None:
    """What is wrong with a card; None if nothing is."""
    if card is None or card_bytes(card) is not None:
        return None
    hint = did_you_mean(card.lower(), CARDS) if isinstance(card, str) else ""
    return f"card must be a size in GiB (24, '24GiB') or one of {', '.join(CARDS)}, got {card!r}.{hint}"
