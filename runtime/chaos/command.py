"""`trimtab chaos PRESET`: train on machines of namespaces, strike the run by a seeded plan, tell what became of it."""

import signal
import sys

from rich.console import Console

from runtime.chaos.campaign import Campaign
from runtime.chaos.options import ChaosOptions
from runtime.chaos.progress import Progress
from runtime.chaos.testbed import open_testbed


def chaos(options: ChaosOptions) -> int:
    """Run a preset to its end or its limit and write the results. Returns 1 if anything was not as promised."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: everything is torn down
    console = Console(highlight=False)
    with open_testbed(options.preset) as testbed, Progress(console) as progress:
        campaign = Campaign(testbed, options, progress)
        try:
            campaign.play()
        finally:  # also of a part of it
            if campaign.trials:
                campaign.write()
            if options.keep:
                campaign.keep()
        results = campaign.results()
    for line in results.summary():
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"written: {options.out / 'chaos.md'}", soft_wrap=True, markup=False)
    return int(results.failed)
