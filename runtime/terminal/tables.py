"""The tables of all commands for the terminal: without borders, numbers to the right."""

from collections.abc import Collection, Sequence
from typing import Any

from rich.table import Table


def new_table(
    heads: Sequence[str], *, left: Collection[int] = (0,), wrap: Collection[int] = (), **options: Any
) -> Table:
    """A table with these columns and no rows yet.

    left: the numbers of the columns that start at the left. wrap: of those that may be wrapped. options: of rich.
    """
    options = {"box": None, "pad_edge": False, "header_style": "bold", "padding": (0, 2, 0, 0)} | options
    table = Table(**options)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in left else "right", no_wrap=number not in wrap)
    return table
