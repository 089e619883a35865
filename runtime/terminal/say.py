"""Prints lines from which people copy paths and commands."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print `text` without breaking it into lines and without reading markup in it."""
    console.print(text, soft_wrap=True, markup=False)
