"""`trimtab plan CONFIG`."""

import argparse
import json
import sys

from rich.console import Console

from runtime.plan.plan import as_json, make_plan
from runtime.plan.subject import read_subject
from runtime.plan.table import print_plan


def plan(given: argparse.Namespace) -> int:
    """Print the plan that these options ask for; 1 where a rank does not fit into its device."""
    made = make_plan(read_subject(given))
    if given.json:
        sys.stdout.write(json.dumps(as_json(made, given.memory_gib)) + "\n")
    else:
        print_plan(made, given.memory_gib, Console())
    return 0 if made.peak_bytes <= given.memory_gib * 2**30 else 1
