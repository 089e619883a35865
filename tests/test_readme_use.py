"""The commands of README's section "Use", each in its order, in one folder, as a new user would type them.

Only options that keep a command short are put behind it.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.readme_checker import ROOT, code_blocks
from tests.workers.model.families.directories import write_directory

TRIMTAB = Path(sys.executable).parent / "trimtab"


@dataclass(frozen=True)
class Use:
    """A command as README prints it, what keeps it short, and what is expected of it.

    typed_in: where else it is typed, when it takes minutes even if it is short.
    """

    printed: str
    shorter: str = ""
    says: str = ""
    leaves: tuple[str, ...] = ()
    typed_in: str = ""


USES = (
    Use("train --name first --steps 200", "--config tiny --steps 12", "first: finished. Step 12 of 12", (
        "runs/first/report.html", "runs/first/config.yaml", "runs/first/checkpoints/step_00000012")),
    Use("eval first", says="bits per byte"),
    Use('generate first --prompt "def main(" --temperature 0.8', "--max-new-tokens 8", "def main("),
    Use("train --resume first --steps 400", "--steps 16", "Step 16 of 16", (
        "runs/first/checkpoints/step_00000016",)),
    Use("report first", says="runs/first/report.html"),
    Use("runs", says="first finished 16/16"),
    Use("train --data.path my-texts/ --name own", "--config tiny --steps 2", "Step 2 of 2", ("runs/own/report.html",)),
    Use("import MODEL mine", says="mine", leaves=("runs/mine/config.yaml",)),
    Use("train --resume mine --steps 100", "--steps 2", "Step 2 of 2", ("runs/mine/report.html",)),
    Use("export mine OUT", says="OUT", leaves=("OUT/config.json", "OUT/model.safetensors", "OUT/tokenizer.json")),
    Use("plan paper-1b --world 64 --ep 8", says="Fits in 80 GiB: yes"),
    Use("plan paper-1b --world 64 --ep 8 --simulate", says="MaxVio"),
    Use("doctor cluster", says="2 ranks on cpu joined"),
    Use("doctor first", says="step_00000016"),
    Use("chaos quick", typed_in="tests/runtime/commands/chaos/test_chaos.py"),
    Use("train --name scored --balance.record 10", "--config tiny --steps 20", "Step 20 of 20", (
        "runs/scored/report.html",)),
    Use("replay scored --law sign:u=0.003", says="sign", leaves=("runs/scored/replay.json", "runs/scored/replay.png")),
    Use("compare --laws sign:u=0.01 newton none --seeds 3", "--config tiny --seeds 1 --steps 8", "newton", (
        "runs/compare/compare.md",)),
    Use("bench balance", "--seeds 1 --steps 40", "adaptive", ("runs/bench-balance",)),
    Use("bench dispatch", "--tokens 256 --hidden 64 --ffn-hidden 64 --num-experts 8 --top-k 2 --rounds 2", "matmul", (
        "runs/bench-dispatch",)),
    Use("bench coordinator", "--layers 2 --experts 8 --workers 2 --rounds 5", "2048", ("runs/bench-coordinator",)),
)  # fmt: skip


def printed_commands() -> list[str]:
    section = re.search(r"^## Use\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    lines = [line for _, language, block in code_blocks(section[1]) if language == "sh" for line in block.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def test_no_command_of_the_readme_is_left_out() -> None:
    assert printed_commands() == [f"trimtab {use.printed}" for use in USES]
    for use in USES:
        typed = ", ".join(f'"{word}"' for word in use.printed.split())
        assert not use.typed_in or typed in (ROOT / use.typed_in).read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine; the commands have bounds of their own
def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path) -> None:
    write_directory(tmp_path / "MODEL", "qwen3_moe")
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "design.txt").write_text((ROOT / "docs" / "laws.md").read_text() * 4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for use in USES:
        if use.typed_in:
            continue
        words = [str(TRIMTAB), *shlex.split(use.printed), *shlex.split(use.shorter)]
        done = subprocess.run(
            words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        told = f"trimtab {use.printed} {use.shorter}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, told
        assert use.says in " ".join((done.stdout + done.stderr).split()), told
        assert [path for path in use.leaves if not (tmp_path / path).exists()] == [], told
