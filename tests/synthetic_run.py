"""Makes run directories with plausible data, through the real writer: a skewed router, the sign law, a falling loss."""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dispatch.layout import LoadLayout
from workers.record.run_log import RunLog

PHASES_S = {"dispatch_s": 0.021, "experts_s": 0.052, "combine_s": 0.017, "bias_update_s": 3e-4, "control_wait_s": 6e-4}


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """What to make. Expert popularity is skewed and drifts a little, so that the law has something to do."""

    steps: int = 60
    total_steps: int = 60
    num_layers: int = 3
    num_experts: int = 8
    top_k: int = 2
    num_tokens: int = 512
    law: str = "sign"
    rate: float = 0.02
    eval_every: int = 20
    skipped_steps: tuple[int, ...] = ()
    finished: bool = True
    seed: int = 0

    @property
    def layout(self) -> LoadLayout:
        names = tuple(f"layers.{index}.moe" for index in range(1, self.num_layers + 1))
        return LoadLayout(names, (self.num_experts,) * self.num_layers, (True,) * self.num_layers)


def make_run(path: Path, made: SyntheticRun = SyntheticRun()) -> Path:
    """Write the run and return its path."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(_config(path.name, made))
    rng = np.random.default_rng(made.seed)
    skew = rng.normal(0, 0.9, (made.num_layers, made.num_experts))
    bias = np.zeros((made.num_layers, made.num_experts), np.float32)
    seen = np.zeros((made.num_layers, made.num_experts), np.int64)
    clock, version = 1.7e9, 0
    with RunLog(path, made.layout) as log:
        log.event("started", time=clock, workers=2, ep_size=2)
        log.event(
            "rank_map", time=clock + 2, ranks=["rank 0: 127.0.0.1 cpu experts 0-3", "rank 1: 127.0.0.1 cpu experts 4-7"]
        )
        log.eval({"step": 0, "time": clock + 4, **_evaluation(0, seen, rng)})
        for step in range(1, made.steps + 1):
            skew += rng.normal(0, 0.01, skew.shape)
            counts = _route(skew, bias, made, rng)
            seen += counts
            skipped = step in made.skipped_steps
            line = _train_line(step, counts, bias, made, rng)
            clock += 3 * line["step_s"]
            log.train(line | {"time": clock, "bias_version": version, "skipped": skipped,
                              "grad_norm": math.inf if skipped else line["grad_norm"]})  # fmt: skip
            log.load(step, counts.ravel(), bias.ravel())
            if made.law == "sign" and not skipped:
                bias += np.float32(made.rate) * np.sign(counts.sum(1, keepdims=True) - made.num_experts * counts)
                bias -= bias.mean(1, keepdims=True)
                version += 1
            if step % made.eval_every == 0 or step == made.total_steps:
                log.eval({"step": step, "time": clock, **_evaluation(step, seen, rng)})
                log.event("checkpoint", time=clock, step=step, path=f"checkpoints/step_{step:08d}", seconds=0.41)
                seen[:] = 0
        log.event("finished" if made.finished else "interrupted", time=clock, step=made.steps)
    return path


def add_metric(run: Path, name: str, value: float) -> None:
    """Write a metric of the user's own into every training line of a run."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({name: value} if line["kind"] == "train" else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _route(skew: np.ndarray, bias: np.ndarray, made: SyntheticRun, rng: np.random.Generator) -> np.ndarray:
    counts = []
    for skew_E, bias_E in zip(skew, bias, strict=True):
        logits = skew_E + rng.normal(0, 1.0, (made.num_tokens, made.num_experts))
        scores = 1 / (1 + np.exp(-logits)) + bias_E
        chosen = np.argpartition(-scores, made.top_k - 1, axis=1)[:, : made.top_k]
        counts.append(np.bincount(chosen.ravel(), minlength=made.num_experts))
    return np.array(counts, np.int64).reshape(made.num_layers, made.num_experts)


def _train_line(step: int, counts: np.ndarray, bias: np.ndarray, made: SyntheticRun, rng: np.random.Generator) -> dict:
    vio = [float(each.max() / each.mean() - 1) for each in counts]
    share = made.top_k / made.num_experts
    floor = math.sqrt(2 * math.log(made.num_experts)) * math.sqrt((1 - share) / (made.num_tokens * share))
    moved = dict.fromkeys(("tokens_routed", "tokens_sent", "tokens_received", "tokens_returned"), int(counts.sum()))
    # An unbalanced load makes every rank wait for the busiest one.
    slow = 1 + 0.25 * (np.mean(vio) if vio else 0)
    phases = {name: seconds * slow * rng.lognormal(0, 0.06) for name, seconds in PHASES_S.items()}
    step_s = sum(phases.values()) + 0.165 * rng.lognormal(0, 0.04) + (0.4 if step == 1 else 0)
    return {
        "step": step,
        "loss": _loss(step) + rng.normal(0, 0.04),
        "lr": 3e-3 * min(1, step / 20),
        "grad_norm": 0.4 + 2 * math.exp(-step / 15) + rng.normal(0, 0.04),
        "step_s": step_s,
        "tokens_per_s": made.num_tokens / step_s,
        "max_vio_batch": float(np.mean(vio)) if vio else 0.0,
        "max_vio_batch_per_layer": vio,
        "max_vio_floor": floor,
        "max_vio_computation_batch": float(np.mean(vio)) * 0.4 if vio else 0.0,
        "dead_experts": int((counts == 0).sum()),
        "bias_min": float(bias.min(initial=0)),
        "bias_max": float(bias.max(initial=0)),
        "sent_bytes": int(counts.sum() * 192 * 4 // 2),
        "bias_checksum": f"{zlib.crc32(bias.astype('<f4').tobytes()):08x}",
        **moved,
        **phases,
    }


def _evaluation(step: int, seen: np.ndarray, rng: np.random.Generator) -> dict:
    loss = _loss(step) + 0.05 + rng.normal(0, 0.01)
    vio = [float(each.max() / each.mean() - 1) if each.any() else 0.0 for each in seen]
    return {
        "val_loss": loss,
        "val_bits_per_byte": loss / math.log(2),
        "val_bits_per_byte_per_source": {"plays": loss * 1.06 / math.log(2), "python": loss * 0.93 / math.log(2)},
        "max_vio_global": float(np.mean(vio)) if vio else 0.0,
        "max_vio_global_per_layer": vio,
        "eval_s": 1.9,
    }


def _loss(step: int) -> float:
    return 1.35 + 3.0 * math.exp(-step / 25) + 1.2 * math.exp(-step / 180)


def _config(name: str, made: SyntheticRun) -> str:
    return f"""\
run: {{name: {name}, steps: {made.total_steps}, seed: {made.seed}, dtype: float32, global_batch_size: 16}}
model:
  hidden: 192
  moe: {{num_experts: {made.num_experts}, top_k: {made.top_k}, score: sigmoid}}
balance: {{law: {made.law}, rate: {made.rate}}}
data: {{path: [], tokenizer: null}}
cluster: {{num_workers: 2, device: cpu}}
"""
