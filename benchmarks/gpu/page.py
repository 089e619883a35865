"""The page of Markdown from the JSON of a run, also of one that was interrupted."""

from benchmarks.gpu.goals import judge
from benchmarks.gpu.section import SECTIONS, Figures, head, row

VERDICTS = {True: "yes", False: "NO", None: "—"}


def page(found: Figures) -> str:
    """Goals first, then the sections in their order."""
    lines = ["# One CUDA device", "", f"{found['device']}, torch {found['torch']}, {found['began']}."]
    lines += [f"Written by `{found['command']}` in {found['seconds']:.0f} s. What was not measured has no figure.", ""]
    lines += _goals(found)
    for name, outcome in found["sections"].items():
        lines += ["", f"## {SECTIONS[name].title}", "", *_section(name, outcome)]
    return "\n".join(lines) + "\n"


def _goals(found: Figures) -> list[str]:
    if found["small"]:
        return ["These are small sizes for a quick look: the goals do not apply to them."]
    lines = ["The goals are for one H100 of 80 GB (docs/performance.md).", "", *head("goal", "", "measured", "met")]
    return lines + [row(goal.text, goal.required, goal.measured, VERDICTS[goal.met]) for goal in judge(found)]


def _section(name: str, outcome: Figures) -> list[str]:
    lines = []
    if outcome["state"] != "measured":
        lines = [f"**{outcome['state']}** after {outcome['seconds']:.0f} s. {outcome['error']}".rstrip(), ""]
    lines += SECTIONS[name].show(outcome["figures"]) if outcome["figures"] else ["No figures."]
    return [*lines, "", f"({outcome['seconds']:.0f} s)"] if outcome["state"] == "measured" else lines
