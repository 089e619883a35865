"""The tables of all commands for the terminal: without borders, numbers to the right."""

from collections.abc import Collection, Sequence
from typing import Any

from rich.table import Table


def new_table(
    heads: Sequence[str], *, left: Collection[int] = (0,), wrap: Collection[int] = (), **options: Any
) -> Table:
    """A table with these columns and no rows yet.

    Args:
        left: indices of the columns that are aligned left; the others are aligned right, as numbers are.
        wrap: indices of the columns whose text may be wrapped.
        options: of rich.table.Table.
    """
    options = {"box": None, "pad_edge": False, "header_style": "bold", "padding": (0, 2, 0, 0)} | options
    table = Table(**options)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index in left else "right", no_wrap=index not in wrap)
    return table
