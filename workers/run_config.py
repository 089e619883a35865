"""How long a run is, on what batches, and how often it evaluates and saves."""

from dataclasses import dataclass
from typing import Literal

from dispatch.errors import InvalidValue

MAX_NAME_BYTES = 200  # file systems take 255; names made from this one, as of lock and partial files, are longer

LOGGERS = ("tensorboard", "wandb", "mlflow")  # see runtime/loggers
# Bounds on samples, which config.yaml and the lines of samples.jsonl hold.
MAX_PROMPTS, MAX_PROMPT_CHARACTERS, MAX_SAMPLE_TOKENS = 16, 500, 512
MAX_TEMPERATURE = 100.0
MAX_BATCH = 2**24  # sequences; bounds the memory of a rank, as each draws the order of the whole batch


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batch, rhythm and name of a run."""

    name: str | None = None
    """Name of the run, which is that of its directory; empty: the time of its start."""
    dir: str = "runs"
    """Directory that holds the runs."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    steps: int = 400
    """Optimizer steps."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all workers."""
    micro_batch_size: int = 0
    """Sequences that a worker computes at once, gradients are summed over them; 0 takes a worker's whole share."""
    eval_every: int = 100
    """Steps between two evaluations on held-out text; 0 evaluates at the end alone."""
    eval_sequences: int = 128
    """Sequences of an evaluation, over all workers; fewer where the held-out text has fewer."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts that each evaluation continues, for the page of `trimtab watch` and samples.jsonl; an empty one begins a
    document. They can be others where a run resumes."""
    sample_tokens: int = 64
    """Tokens to add to each of them, unless the document ends before."""
    sample_temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's distribution, by run.seed."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0 saves at the end and on Ctrl-C alone."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; older ones are removed."""
    async_checkpoints: bool = True
    """Write checkpoints beside the training, which stops for a copy in memory alone; the last one is waited for."""
    memory_checkpoint_every: int = 10
    """Steps between two checkpoints that the workers keep in each other's memory; 0 keeps none."""
    full_disk_wait_s: float = 600.0
    """How long the last checkpoint is tried again when the disk does not take it, before the run fails."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the computation; weights, router and optimizer are float32 with either. A preset that trains on
    the GPUs of this machine takes bfloat16."""
    log_to: tuple[str, ...] = ()
    """Tools that get the metrics while the run trains: any of tensorboard, wandb and mlflow, each an extra of that
    name. They can be others where a run resumes."""
    on_bias_mismatch: Literal["stop", "repair"] = "stop"
    """When the bias of a rank was changed by something else: stop, or repair it from the law's state and go on."""

    accept_holes: bool = False
    """Go on with --resume though records of earlier steps are damaged or missing; the events then say which."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "eval_sequences", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"run.{name} ({getattr(self, name)}) must be at least 1")
        if self.global_batch_size > MAX_BATCH:
            raise InvalidValue(
                f"run.global_batch_size ({self.global_batch_size}) must be at most {MAX_BATCH} sequences"
            )
        periods = ("eval_every", "checkpoint_every", "memory_checkpoint_every")
        for name in ("seed", "micro_batch_size", *periods, "full_disk_wait_s"):
            if not getattr(self, name) >= 0:  # this form also refuses NaN
                raise InvalidValue(f"run.{name} ({getattr(self, name)}) must be 0 or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise InvalidValue(f"run.dtype is {self.dtype!r:.60}; it must be float32 or bfloat16")
        self._check_loggers()
        self._check_samples()
        if self.on_bias_mismatch not in ("stop", "repair"):
            raise InvalidValue(f"run.on_bias_mismatch is {self.on_bias_mismatch!r:.60}; it must be stop or repair")
        if self.name is not None and not _is_plain(self.name):
            raise InvalidValue(
                f"run.name {self.name!r:.60} must be a plain directory name, without a slash, a control character, or "
                "a leading dot or dash; where the runs lie is run.dir"
            )
        if self.name is not None and len(self.name.encode()) > MAX_NAME_BYTES:
            raise InvalidValue(f"run.name {self.name[:20]!r}... must have at most {MAX_NAME_BYTES} bytes")

    def _check_loggers(self) -> None:
        unknown = [name for name in self.log_to if name not in LOGGERS]
        if unknown or len(set(self.log_to)) < len(self.log_to):
            what = f"names {unknown[0]!r:.60}" if unknown else f"({', '.join(self.log_to)}) names one twice"
            raise InvalidValue(f"run.log_to {what}; it can name {', '.join(LOGGERS)}, each once, as in [wandb]")

    def _check_samples(self) -> None:
        prompts = self.sample_prompts
        if len(prompts) > MAX_PROMPTS:
            raise InvalidValue(f"run.sample_prompts has {len(prompts)} prompts; it can have {MAX_PROMPTS} at most")
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise InvalidValue(
                    f"prompt {number} of run.sample_prompts has {len(prompt)} characters; it can have "
                    f"{MAX_PROMPT_CHARACTERS} at most"
                )
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise InvalidValue(f"prompt {number} of run.sample_prompts is not UTF-8; give it in that encoding")
        if not 0 <= self.sample_temperature <= MAX_TEMPERATURE:
            raise InvalidValue(f"run.sample_temperature ({self.sample_temperature}) must be 0 to {MAX_TEMPERATURE:g}")
        if not 1 <= self.sample_tokens <= MAX_SAMPLE_TOKENS:
            raise InvalidValue(f"run.sample_tokens ({self.sample_tokens}) must be 1 to {MAX_SAMPLE_TOKENS}")

    def sequences_per_rank(self, world_size: int, context: int = 1) -> int:
        """Sequences of the global batch for each rank, or for each group of `context` ranks that share sequences.

        Raises InvalidValue where the batch cannot be divided evenly.
        """
        num_shares = world_size // context
        if self.global_batch_size % num_shares:
            above = -(-self.global_batch_size // num_shares) * num_shares
            shared = f" / parallel.context ({world_size} / {context})" if context > 1 else f" ({world_size})"
            raise InvalidValue(
                f"run.global_batch_size ({self.global_batch_size}) must be a multiple of cluster.num_workers"
                f"{shared}: every worker takes the same number of sequences; {above} would do"
            )
        return self.global_batch_size // num_shares

    def num_micro_batches(self, world_size: int, context: int = 1) -> int:
        """Forward and backward passes of one step on each rank. Raises InvalidValue where they would be uneven."""
        share = self.sequences_per_rank(world_size, context)
        micro_batch_size = self.micro_batch_size or share
        if share % micro_batch_size:
            sizes = [size for size in range(1, share + 1) if share % size == 0]
            raise InvalidValue(
                f"run.micro_batch_size ({micro_batch_size}) must divide a worker's share of the batch ({share} = "
                f"run.global_batch_size {self.global_batch_size} / {world_size // context} workers); use one of "
                f"{sizes}, or 0"
            )
        return share // micro_batch_size

    def sequences_at_once(self, world_size: int) -> int:
        """Sequences of a micro-batch on each rank. Raises InvalidValue as `num_micro_batches`."""
        return self.sequences_per_rank(world_size) // self.num_micro_batches(world_size)


def _is_plain(name: str) -> bool:
    return name.isprintable() and "/" not in name and not name.startswith((".", "-")) and bool(name)
