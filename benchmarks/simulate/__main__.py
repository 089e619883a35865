"""Compares predicted step times with those measured on this machine, and with figures that others publish.

    python -m benchmarks.simulate [--out rates.json]     measures ranks over gloo, each on a core if there are enough
    python -m benchmarks.simulate --public               computes only

Nothing is fitted to the measured steps. The machine's rates are measured in the same run by small programs on one core,
in turns with the steps of each case. The link between two gloo ranks is also used for four ranks. These share the
cores, so that their work is divided by the number of cores.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.processes import run_processes
from benchmarks.simulate.cases import cases_of
from benchmarks.simulate.measure import Measured, measure
from benchmarks.simulate.public import print_public
from runtime.commands.plan.simulate.hardware import Hardware, LinkCost
from runtime.commands.plan.simulate.routing import factors_of_load
from runtime.commands.plan.simulate.simulation import Simulation
from runtime.job.launch import make_spec
from workers.data.prepare import prepare_dataset

EP_SIZES = (2, 1, 4)


def predicted(measured: Measured, hardware: Hardware, text: Path) -> tuple[float, float]:
    """Predicted seconds of the step, with the routing of the measured step and with even routing."""
    simulation = Simulation(measured.case.subject(text), hardware, experts="looped")
    factors = factors_of_load(measured.load_LE, simulation.experts_of_ranks)
    return simulation.step(factors).step_s, simulation.step().step_s


def measure_all(folder: Path, ep_sizes: Sequence[int]) -> tuple[list[Measured], LinkCost, float]:
    """The measurements of every case, and the link between two ranks. Each world size has new processes."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall;\n" for n in range(40_000)))
    found: list[Measured] = []
    links: dict[int, tuple[LinkCost, float]] = {}
    for ep_size in ep_sizes:
        configs = {case: case.config(text) for each in cases_of(ep_size) for case in (each, each.twin)}
        dataset = prepare_dataset(next(iter(configs.values())).data)
        specs = {case: make_spec(config, folder, dataset) for case, config in configs.items()}
        cases, link, factor = run_processes(ep_size, measure, specs)[0]
        links[ep_size] = (link, factor)
        found += cases
    return found, *links[2]


def row_of(each: Measured, hardware: Hardware, text: Path) -> str:
    """A line of the table."""
    seconds, even = predicted(each, hardware, text)
    names = ("dense_flops_per_s", "grouped_flops_per_s", "attention_flops_per_s")
    rates = " / ".join(f"{getattr(hardware, name) / 1e9:.0f}" for name in names)
    error = seconds / each.step_s - 1
    times = (f"{1e3 * value:.0f}" for value in (each.wall_s, each.step_s, seconds))
    ratios = (f"{100 * error:+.0f} %", f"{seconds / even:.2f}")
    others = (f"{hardware.memory_bytes_per_s / 1e9:.1f}", f"{1e3 * hardware.host_s:.1f}")
    return f"| {' | '.join((str(each.case.ep_size), each.case.name, *times, *ratios, rates, *others))} |"


def print_measured(found: Sequence[Measured], link: LinkCost, factor: float, folder: Path) -> Hardware:
    """Print the table; returns the rates of the last case, with its links."""
    print(f"gloo, 2 ranks: {link.bytes_per_s / 1e9:.2f} GB/s; a sum over ranks takes {factor:.1f} times as long\n")
    heads = (
        "EP",
        "model",
        "wall, ms",
        "measured, ms",
        "predicted, ms",
        "error",
        "times even",
        "GFLOP/s",
        "GB/s",
        "host, ms",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    text, hardware = folder / "text.txt", found[0].rates
    for each in sorted(found, key=lambda one: one.case.ep_size):
        hardware = replace(each.rates, node=link, network=link, control=link, reduce_factor=factor)
        print(row_of(each, hardware, text))
    return hardware


def main() -> int:
    """Measure or compute, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", action="store_true", help="figures that others publish; measures nothing")
    parser.add_argument("--ep", type=int, nargs="+", default=EP_SIZES, help="2 and others (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the rates, to give to trimtab plan --simulate --hardware")
    options = parser.parse_args()
    if options.public:
        print_public()
        return 0
    with tempfile.TemporaryDirectory() as name:
        found, link, factor = measure_all(Path(name), options.ep)
        hardware = print_measured(found, link, factor, Path(name))
    if options.out:
        options.out.write_text(json.dumps(asdict(hardware)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
