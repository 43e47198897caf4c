"""layers_to_transform: adapters in some of the numbered blocks only."""

from collections.abc import Iterable

from lightning_lora.errors import did_you_mean

ANY = ""  # the key for indices that are given without a tower


class BlockFilter:
    """Admits layers by the index of the outermost numbered block that they lie in, per tower.

    Args:
        wanted: ``layers_to_transform`` as the user gave it.
        names: All module names of the model.
    """

    def __init__(self, wanted: int | list[int] | dict[str, list[int]] | None, names: Iterable[str]) -> None:
        towers = wanted if isinstance(wanted, dict) else {ANY: [wanted] if isinstance(wanted, int) else wanted or []}
        self._active = wanted is not None
        self._wanted = {tower: set(indices) for tower, indices in towers.items()}
        self._seen: dict[str, set[int]] = {tower: set() for tower in self._wanted}
        self._names = list(names)

    def admits(self, names: list[str]) -> bool:
        """Whether a layer under one of these names is to be adapted."""
        if not self._active:
            return True
        admitted = False
        for name in names:
            for tower, indices in self._wanted.items():
                block = _block_index(name, tower)
                if block is not None:
                    self._seen[tower].add(block)
                    admitted |= block in indices
        return admitted

    def problems(self) -> list[str]:
        """Towers that do not exist, and indices that no layer has, once all layers were asked for."""
        found = []
        for tower, indices in self._wanted.items() if self._active else ():
            seen, where = self._seen[tower], f"layers_to_transform[{tower!r}]" if tower else "layers_to_transform"
            if tower and not any(_after(name, tower) is not None for name in self._names):
                parts = {part for name in self._names for part in name.split(".")}
                found.append(f"layers_to_transform: no module is named {tower!r}.{did_you_mean(tower, sorted(parts))}")
            elif missing := sorted(indices - seen):
                has = f"blocks {min(seen)} to {max(seen)}" if seen else "no numbered blocks with such layers"
                found.append(f"{where}: there is no block {', '.join(map(str, missing))}; the model has {has}")
        return found


def _after(name: str, tower: str) -> str | None:
    """What of a name comes behind a tower's name (which may itself have dots); None if it is not in there."""
    _, found, rest = f".{name}.".partition(f".{tower}.")
    return rest if found else None


def _block_index(name: str, tower: str) -> int | None:
    rest = name if tower == ANY else _after(name, tower)
    return next((int(part) for part in (rest or "").split(".") if part.isdigit()), None)
