"""The tests marked gpu, and the parity kit over NCCL in each dtype, all at once: they measure nothing."""

from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.commands import CommandFailed, run_module
from benchmarks.gpu.section import Figures, Setting, head, row

DTYPES = ("float64", "float32", "bfloat16")


def measure(setting: Setting) -> None:
    """Tell of each check whether it passed, and else what it said last."""
    sizes = setting.sizes
    commands = {"pytest -m gpu": ("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *sizes.tests)} | {
        f"parity in {dtype}": ("dispatch.parity", "--device", "cuda", "--ep", "1", "--dtype", dtype, *sizes.parity)
        for dtype in DTYPES
    }
    found: Figures = {}
    with ThreadPoolExecutor(len(commands)) as pool:
        for name, result in zip(commands, pool.map(_run, commands.values()), strict=True):
            found[name] = result
            setting.tell(found)


def _run(command: tuple[str, ...]) -> Figures:
    try:
        printed = run_module(*command)
    except CommandFailed as failed:
        return {"passed": False, "said": str(failed)}
    return {"passed": True, "said": printed.strip().splitlines()[-1]}


def show(figures: Figures) -> list[str]:
    """A line for each check."""
    return [
        *head("check", "", "it said last"),
        *(row(name, "passed" if found["passed"] else "FAILED", found["said"]) for name, found in figures.items()),
    ]
