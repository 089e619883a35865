"""What `trimtab eval` and `trimtab generate` do with a trained run: by default in this process alone, without Ray."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.job.launch import make_spec, open_ranks, runs_in_process
from runtime.runs.run_inputs import find_checkpoint, open_data, still_there
from runtime.settings.config import TrainConfig, cross_check
from runtime.settings.config_file import override, read_run_config
from runtime.terminal.new_text import NewText
from runtime.terminal.say import say
from workers.data.chat import load_template
from workers.data.tokenizer import Tokenizer, load_tokenizer
from workers.distributed.pipeline import PipelineConfig
from workers.generation.generate import SamplingConfig, Speed
from workers.training.evaluation import Evaluation
from workers.worker import Continuations

BETWEEN_TEXTS = "---\n"


def evaluate(
    run_dir: Path,
    *,
    sequences: int | None,
    step: int | None,
    workers: int | None,
    device: str | None,
    settings: Sequence[str] = (),
) -> int:
    """Measure a checkpoint of a run on the held-out text and print the result.

    settings: options of `trimtab train` that say where the text lies now.
    """
    console = Console(highlight=False)
    config = override(config_for(run_dir, workers, device), settings)
    path = find_checkpoint(run_dir, step)
    dataset = open_data(config, console, run_dir)
    with (
        console.status(f"evaluating on {_place(config)}"),
        open_ranks(config.cluster, make_spec(config, run_dir, dataset)) as ranks,
    ):
        path = still_there(path, run_dir, step)
        results: list[Evaluation] = ranks.run("evaluate", path.absolute(), sequences or config.run.eval_sequences)
    result = results[0]
    say(
        console,
        f"{path}: {result.val_bits_per_byte:.4f} bits per byte, loss {result.val_loss:.4f} "
        f"on {result.num_tokens:,} held-out tokens ({result.eval_s:.1f} s on {_place(config)})",
    )
    for source, bits in result.val_bits_per_byte_per_source.items():
        say(console, f"  {source:12} {bits:.4f} bits per byte")
    return 0


def generate(
    run_dir: Path,
    *,
    prompts: Sequence[str],
    before: Sequence[dict[str, str]] | None = None,
    sampling: SamplingConfig,
    step: int | None,
    workers: int | None,
    device: str | None,
) -> int:
    """Continue prompts with a checkpoint of a run; print each with its continuation, and the speed on stderr.

    before: messages of a conversation, in which each prompt is what the user says next: the run's chat template writes
    it, and only the reply is printed. None: prompts are plain texts.

    A single text appears on a terminal as it comes. Ctrl-C prints what there is before it ends the command. Neither
    the training text nor its prepared tokens are needed.
    """
    console = Console(stderr=True, highlight=False)
    config = config_for(run_dir, workers, device)
    path = find_checkpoint(run_dir, step)
    tokenizer = load_tokenizer(config.data.tokenizer)
    shown = prompts
    if before is not None:
        template = load_template(config.data.chat_template, config.data.tokenizer)
        prompts = [template.render_prompt([*before, {"role": "user", "content": prompt}]) for prompt in prompts]
        shown = [""] * len(prompts)
    _warn_of_long_prompts(prompts, tokenizer, config.model.max_seq_len, console)
    # Tokens can be shown as they come in this process alone: ranks of Ray could not call `new.add` for each of them.
    is_here = runs_in_process(config.cluster)
    is_streamed = len(prompts) == 1 and is_here and sys.stdout.isatty()
    with NewText(tokenizer, shown, sys.stdout if is_streamed else None, console) as new:
        try:
            with open_ranks(config.cluster, make_spec(config, run_dir, None)) as ranks:
                path = still_there(path, run_dir, step)
                told = (new.add,) if is_here else ()
                results: list[Continuations] = ranks.run("generate", path.absolute(), list(prompts), sampling, *told)
        except KeyboardInterrupt:
            new.finish()
            if not is_streamed:
                sys.stdout.write(_joined(shown, new.texts()))
            say(console, f"stopped after {new.num_tokens:,} new tokens")
            raise
        new.finish()
    if not is_streamed:
        sys.stdout.write(_joined(shown, {index: text for result in results for index, text in result.texts.items()}))
    say(console, f"{Speed.of_all([result.speed for result in results])}; on {_place(config)}")
    return 0


def config_for(run_dir: Path, workers: int | None, device: str | None) -> TrainConfig:
    """The run's settings on one worker of this machine, or on `workers` of the run's cluster.

    A checkpoint holds experts by their global ids: they load onto any number of ranks.
    """
    config = read_run_config(run_dir)
    changes: dict[str, Any] = {"num_workers": workers or 1, "min_workers": 0, "max_workers": 0}
    if workers is None:
        changes["address"] = None
    if device is not None:
        changes["device"] = device
    cluster = replace(config.cluster, **changes)
    # An exchange is chosen for the ranks and devices that the run was trained on; copies and records are for training.
    parallel = replace(
        config.parallel, ep_size=0, exchange="auto", ranks_per_node=0, expert_copies=0, pipeline=PipelineConfig()
    )
    balance = replace(config.balance, record=0)
    config = replace(config, cluster=cluster, parallel=parallel.resized_to(cluster.num_workers), balance=balance)
    cross_check(config)
    return config


def _place(config: TrainConfig) -> str:
    num_workers = config.cluster.num_workers
    return f"{num_workers} workers" if num_workers > 1 else "1 worker; --workers N takes more"


def _joined(prompts: Sequence[str], texts: dict[int, str]) -> str:
    return BETWEEN_TEXTS.join(f"{prompt}{texts.get(index, '')}\n" for index, prompt in enumerate(prompts))


def _warn_of_long_prompts(prompts: Sequence[str], tokenizer: Tokenizer, max_seq_len: int, console: Console) -> None:
    for number, prompt in enumerate(prompts, start=1):
        num_tokens = len(tokenizer.encode(prompt))
        if num_tokens > max_seq_len:
            say(
                console,
                f"warning: prompt {number} has {num_tokens:,} tokens and the model reads {max_seq_len:,}: "
                f"its first {num_tokens - max_seq_len:,} are left out",
            )
