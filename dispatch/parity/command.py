"""The command `python -m dispatch.parity`: its options, checked before a process starts, and its report."""

import argparse
import fnmatch
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dispatch.errors import InvalidValue
from dispatch.parity.cases import CASES, NUM_EXPERTS
from dispatch.parity.check import PRECISIONS, Deviation, Row, check
from dispatch.parity.launch import RankFailed, launch, launched_world_size
from dispatch.parity.layers import VARIANTS, Adapter, adapter_of
from dispatch.parity.measure import COLUMNS

DEFAULT_EP = 2
TIMEOUT = timedelta(seconds=120)  # of one collective: a case takes well under a second
MAX_SHOWN = 10  # deviations of a failed row: the first say what is wrong


@dataclass(frozen=True)
class Options:
    """A checked command line; names instead of functions, since it is pickled to the ranks."""

    ep: int
    device: str
    cases: tuple[str, ...]
    dispatchers: tuple[str, ...]
    layer: str | None
    dtype: str
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 when all is equal, 1 when anything differs or fails; exits with 2 on wrong usage."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.list:
        sys.stdout.write("cases:       " + " ".join(case.name for case in CASES) + "\n")
        sys.stdout.write("dispatchers: " + " ".join(VARIANTS) + "\n")
        return 0
    try:
        options = _checked(given, launched_world_size(), torch.cuda.device_count())
    except InvalidValue as error:
        parser.error(str(error))
    try:
        return 0 if launch(options.ep, options.device, TIMEOUT, run_on_rank, options) else 1
    except RankFailed as failure:
        sys.stderr.write(f"{failure}\n")
        return 1


def run_on_rank(group: dist.ProcessGroup, device: torch.device, options: Options) -> bool:
    """What each rank does: the check, and on rank 0 the report. Returns whether all is equal, the same on all ranks."""
    torch.set_num_threads(1)
    # For its side effect: torch fills uninitialised memory with NaN, so that a row that nobody wrote shows. On CUDA
    # warn_only, since kernels without a deterministic form may still run.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    cases = [case for case in CASES if case.name in options.cases]
    rows = check(cases, _adapters(options), group, dtype=options.dtype, device=device, seed=options.seed)
    if dist.get_rank(group) == 0:
        sys.stdout.write(report(rows, f"ep {options.ep}, {device.type}, {options.dtype}, seed {options.seed}"))
        sys.stdout.flush()
    return not any(row.failures for row in rows)


def load_adapter(name: str) -> Adapter:
    """The function that `package.module:function` names. Raises InvalidValue with what is missing."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InvalidValue(f"--layer is {name!r:.60}; it must be package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidValue(f"--layer {name}: {error}; start where the module can be imported") from error
    adapter: Adapter | None = getattr(module, function_name, None)
    if not callable(adapter):
        raise InvalidValue(f"--layer {name}: {module.__name__} has no function {function_name!r}")
    return adapter


def report(rows: Sequence[Row], title: str) -> str:
    """A line for each case and layer, under each failed one what differs, and a closing line."""
    names, layers = [len(row.case) for row in rows], [len(row.layer) for row in rows]
    head = f"{'case':<{max(names)}}  {'layer':<{max(layers)}}  " + "  ".join(f"{column:>9}" for column in COLUMNS)
    lines = [f"largest relative errors against the slow reference, {title}", head]
    for row in rows:
        errors = "  ".join(f"{row.worst(column):9.1e}" for column in COLUMNS)
        verdict = "FAIL" if row.failures else "PASS"
        lines.append(f"{row.case:<{max(names)}}  {row.layer:<{max(layers)}}  {errors}  {verdict}")
        lines += [f"    {_describe(d, row)}" for d in row.failures[:MAX_SHOWN]]
        if len(row.failures) > MAX_SHOWN:
            lines.append(f"    and {len(row.failures) - MAX_SHOWN} more")
    num_failed = sum(bool(row.failures) for row in rows)
    lines.append(f"{len(rows) - num_failed} of {len(rows)} equal" + (f", {num_failed} FAILED" if num_failed else ""))
    return "\n".join(lines) + "\n"


def _describe(deviation: Deviation, row: Row) -> str:
    text = f"{deviation.column}: {deviation.tensor} on rank {deviation.rank}: relative error {deviation.error:.1e}"
    text += f" (limit {row.precision.limit:g}), largest element {deviation.magnitude:.1e}"
    return f"{text}, {deviation.note}" if deviation.note else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dispatch.parity",
        description="Compare an MoE layer spread over EP ranks with a slow reference in one process.",
    )
    add = parser.add_argument
    add("--ep", type=int, help=f"EP ranks, started on this machine (default {DEFAULT_EP}); under torchrun its world")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda takes one device a rank, and NCCL")
    add("--cases", nargs="+", default=["*"], metavar="GLOB", help="cases to run (default all)")
    add("--dispatchers", nargs="+", metavar="GLOB", help="our dispatchers to run (default all)")
    add("--layer", metavar="MODULE:FUNCTION", help="an adapter for your layer, instead of our dispatchers")
    add("--dtype", choices=tuple(PRECISIONS), default="float64", help="of the layer; the reference is float64")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--list", action="store_true", help="list cases and dispatchers")
    return parser


def _checked(given: argparse.Namespace, world_size: int | None, num_devices: int) -> Options:
    """Turn parsed arguments into options; `world_size` is the launcher's, None without one."""
    if given.layer and given.dispatchers:
        raise InvalidValue("--dispatchers chooses among our layers and --layer names yours; give one of them")
    if world_size is not None and given.ep not in (None, world_size):
        raise InvalidValue(f"--ep ({given.ep}) must be the world size of the launcher ({world_size}); leave --ep out")
    ep = world_size or (DEFAULT_EP if given.ep is None else given.ep)
    if not 1 <= ep <= NUM_EXPERTS:
        raise InvalidValue(f"--ep ({ep}) must be between 1 and {NUM_EXPERTS}, the experts of the cases")
    if given.device == "cuda" and world_size is None and ep > num_devices:
        raise InvalidValue(
            f"--ep ({ep}) needs a CUDA device for each rank and there are {num_devices}; lower --ep or take cpu"
        )
    if given.layer:
        load_adapter(given.layer)
    return Options(
        ep=ep,
        device=given.device,
        cases=_matching("--cases", given.cases, [case.name for case in CASES]),
        dispatchers=_matching("--dispatchers", given.dispatchers or ["*"], VARIANTS),
        layer=given.layer,
        dtype=given.dtype,
        seed=given.seed,
    )


def _matching(option: str, globs: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise InvalidValue(f"{option} {glob!r} matches none of {', '.join(names)}")
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs))


def _adapters(options: Options) -> dict[str, Adapter]:
    if options.layer:
        return {options.layer: load_adapter(options.layer)}
    return {name: adapter_of(name) for name in options.dispatchers}
