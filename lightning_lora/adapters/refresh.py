"""Takes anew what follows from the values of many adapters, when these have changed."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters.dora import DoRAAdapter
from lightning_lora.adapters.host import Host
from lightning_lora.ops.norms import Normed, merged_row_norms_of
from lightning_lora.ops.site import RowGain, row_gain_of

AT_ONCE = 1 << 24  # values of weights: for larger ones nothing is gained, and what they have in common would be large


@torch.no_grad()
def refresh(adapters: Iterable[tuple[Host, DoRAAdapter]]) -> None:
    """Values of adapters have changed. Compiled graphs read norms from where they are, so that they are taken at once.

    What can be is done for many adapters together: for small weights each operation takes longer to start than to run.
    """
    fresh: dict[Any, list[tuple[DoRAAdapter, Tensor]]] = {}
    for adapter, norms in _norms(adapters):
        fresh.setdefault((norms.device, norms.dtype, adapter.magnitude.dtype), []).append((adapter, norms))
    for together in fresh.values():
        magnitudes = torch.cat([adapter.magnitude.flatten() for adapter, _ in together])
        rows: Any = row_gain_of(magnitudes, torch.cat([norms.flatten() for _, norms in together]))
        sizes = [norms.numel() for _, norms in together]
        kept: Any = [adapter.known.norms for adapter, _ in together]
        torch._foreach_copy_(kept, [norms for _, norms in together])
        for (adapter, norms), *own in zip(together, *(torch.split(whole, sizes) for whole in rows), strict=True):
            adapter.keep_rows(RowGain(*own) if norms.dim() == 1 else RowGain(*(each.view(norms.shape) for each in own)))


def _norms(adapters: Iterable[tuple[Host, DoRAAdapter]]) -> Iterator[tuple[DoRAAdapter, Tensor]]:
    """The norms that adapters have now, of those that keep them."""
    waiting, values = list[tuple[DoRAAdapter, Normed]](), 0
    for host, adapter in adapters:
        if not adapter.outdated(host):
            continue
        if host.lora_packed:  # unpacked it is large, and only there until the next one is
            yield adapter, adapter.norms_now(host)
            continue
        waiting.append((adapter, adapter.normed(host)))
        values += waiting[-1][1].W.numel()
        if values >= AT_ONCE:
            yield from _of(waiting)
            waiting, values = [], 0
    yield from _of(waiting)


def _of(waiting: list[tuple[DoRAAdapter, Normed]]) -> Iterator[tuple[DoRAAdapter, Tensor]]:
    found = merged_row_norms_of([normed for _, normed in waiting])
    return zip((adapter for adapter, _ in waiting), found, strict=True)
