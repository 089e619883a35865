"""`trimtab bench dispatch` on one device: that no layer is faster than its limit."""

import json

from benchmarks.gpu.commands import run_module
from benchmarks.gpu.section import Figures, Setting, head, row


def measure(setting: Setting) -> None:
    """Run the command, and read the file that it writes."""
    out = setting.folder / "dispatch"
    command = ("runtime", "bench", "dispatch", "--device", setting.device.type, "--workers", "1")
    run_module(*command, *setting.sizes.dispatch, "--out", str(out))
    (record,) = out.glob("*.json")
    values = json.loads(record.read_text())
    walls = {dtype: figures["wall"] for dtype, figures in values["figures"].items()}
    sizes = {name: values["case"][name] for name in ("tokens", "hidden")}
    setting.tell({"sizes": sizes, "walls": walls})


def show(figures: Figures) -> list[str]:
    """A line for each dtype."""
    lines = head("dtype", "layer, ms", "bare matmuls, ms", "layer / bare", "")
    for dtype, wall in figures["walls"].items():
        verdict = "" if wall["ratio"] >= 1 else "FASTER THAN ITS LIMIT"
        times = (f"{1e3 * wall[which]:.2f}" for which in ("measured", "bare"))
        lines.append(row(dtype, *times, f"{wall['ratio']:.2f}", verdict))
    return lines
