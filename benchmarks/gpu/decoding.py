"""One prompt continued by the default model, in fp32 and bf16, by the path of `trimtab generate`.

A short text first compiles what has to be compiled. The measured one outgrows it, so that what is done anew for every
length shows.
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.section import Figures, Setting, head, row
from runtime.job.coordinator import CoordinatorPolicy
from runtime.job.launch import make_spec, open_ranks
from runtime.settings.config import TrainConfig
from runtime.settings.config_file import parse_train
from workers.checkpoints.checkpoint_files import CHECKPOINTS, checkpoint_path
from workers.data.prepare import prepare_dataset
from workers.generation.generate import SamplingConfig, Speed

DTYPES = ("float32", "bfloat16")
PROMPT = "ROMEO:"


def measure(setting: Setting) -> None:
    """Train one step, which saves a model, and continue the prompt in each dtype."""
    arguments = [*setting.sizes.decoding, "--workers", "1", "--device", setting.device.type, "--steps", "1"]
    arguments += ["--run.eval_every", "0", "--run.checkpoint_every", "0", "--run.dtype", "float32"]
    config = parse_train(arguments).config
    config = replace(config, cluster=replace(config.cluster, address=None))  # in this process
    run_dir = setting.folder / "model"
    run_dir.mkdir()
    _save_model(config, run_dir)
    found: Figures = {}
    for dtype in DTYPES:
        in_dtype = replace(config, run=replace(config.run, dtype=dtype))
        speed = _decode(in_dtype, run_dir, setting.sizes.new_tokens)
        found[dtype] = {
            "tokens_per_s": speed.new_tokens / speed.decode_s,
            "new_tokens": speed.new_tokens,
            "prefill_s": speed.prefill_s,
        }
        setting.tell(found)


def _save_model(config: TrainConfig, run_dir: Path) -> None:
    spec = make_spec(config, run_dir, prepare_dataset(config.data))
    with open_ranks(config.cluster, replace(spec, call_coordinator=CoordinatorPolicy().handle)) as ranks:
        ranks.run("train")


def _decode(config: TrainConfig, run_dir: Path, new_tokens: int) -> Speed:
    """Of the second text. Greedy: a model that was hardly trained would soon draw the end of its text."""
    path = checkpoint_path(run_dir / CHECKPOINTS, 1)
    with open_ranks(config.cluster, make_spec(config, run_dir, None)) as ranks:
        sampling = SamplingConfig(max_new_tokens=max(1, new_tokens // 10))
        ranks.run("generate", path, [PROMPT], sampling)
        speed: Speed = ranks.run("generate", path, [PROMPT], replace(sampling, max_new_tokens=new_tokens))[0].speed
    return speed


def show(figures: Figures) -> list[str]:
    """A line for each dtype."""
    lines = head("one prompt", "tokens/s", "new tokens", "the prompt, ms")
    for dtype, found in figures.items():
        lines.append(row(dtype, f"{found['tokens_per_s']:.0f}", found["new_tokens"], f"{1e3 * found['prefill_s']:.1f}"))
    return lines
