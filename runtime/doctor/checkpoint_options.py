"""The options of `trimtab doctor PATH`. Imports no torch: help and mistakes are answered at once."""

import argparse
from pathlib import Path

from runtime.option_types import whole

DESCRIPTION = """\
Examine a checkpoint without a GPU and without the memory of a model: every expert there once and unlike the others,
values finite, shapes and dtypes those of the configuration, biases fp32, moved and centred, files as they were written.
Ends with 1 and names file and tensor where something is wrong."""


def checkpoint_parser() -> argparse.ArgumentParser:
    """A parser whose options are None where they were not given."""
    parser = argparse.ArgumentParser(prog="trimtab doctor PATH", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "path", metavar="PATH", help="a run (its directory, or its name in runs/), a checkpoint, or a directory of "
        "Hugging Face with config.json and safetensors"
    )  # fmt: skip
    parser.add_argument("--step", type=whole(0), help="of a run: its checkpoint (the newest)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there")
    return parser
