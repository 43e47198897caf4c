"""Tables of rich, on the screen and as text."""

import sys
from io import StringIO

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Prints a table, as wide as the terminal, or where there is none as wide as a line."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def as_text(table: Table, width: int) -> str:
    """The table as plain text."""
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
