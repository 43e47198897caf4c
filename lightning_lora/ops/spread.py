"""How a budget of rank is spread over layers. Pure, and the same on every rank."""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """What a layer could do with rank.

    Args:
        gains: What each next component is worth, not increasing; no more of them than it may have.
        cost: What one costs.
        least: How many it gets anyway.
    """

    gains: Sequence[float]
    cost: int = 1
    least: int = 0


def spread(layers: Mapping[str, Share], budget: int) -> dict[str, int]:
    """Ranks that gain the most within a budget.

    Components are taken in the order of what they gain for their cost; since a layer's gains don't increase, that is
    the best there is for equal costs, and within one component of it for others. Ties go to the layer that has taken
    less, then to the first.

    Args:
        layers: By name, in the model's order.
        budget: The sum of the costs, which is not exceeded but by what layers get anyway.

    Returns:
        The number of components of each layer.

    Example:
        >>> spread({"q": Share([0.9, 0.05]), "k": Share([0.5, 0.3]), "v": Share([0.1])}, budget=3)
        {'q': 1, 'k': 2, 'v': 0}
    """
    ranks = {name: min(share.least, len(share.gains)) for name, share in layers.items()}
    left = budget - sum(rank * layers[name].cost for name, rank in ranks.items())
    waiting: list[tuple[float, int, int, str]] = []

    def offer(place: int, name: str) -> None:
        share, rank = layers[name], ranks[name]
        if rank < len(share.gains):
            heapq.heappush(waiting, (-share.gains[rank] / share.cost, rank, place, name))

    for place, name in enumerate(layers):
        offer(place, name)
    while waiting and left > 0:
        _, _, place, name = heapq.heappop(waiting)
        if layers[name].cost <= left:
            left -= layers[name].cost
            ranks[name] += 1
            offer(place, name)
    return ranks
