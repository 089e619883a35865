"""Makes the lines of metrics.jsonl from steps and evaluations (docs/run-directory.md). Sums: `summed_metrics`."""

import time
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dispatch.laws.load_metrics import max_vio_floor, max_vio_per_layer, num_dead_experts
from dispatch.layout import LoadLayout
from workers.model.flops import ModelFlops
from workers.training.evaluation import Evaluation
from workers.training.step import StepResult


def train_line(result: StepResult, layout: LoadLayout, top_k: int, flops: ModelFlops) -> dict[str, Any]:
    """The line of a training step. Sums, loads and bias are of all ranks; seconds and bytes are rank 0's."""
    control, tokens_per_s = result.control, result.num_tokens / result.step_s
    per_layer = max_vio_per_layer(control.load_N, layout)
    floors = [max_vio_floor(result.num_tokens, num_experts, top_k) for num_experts in layout.num_experts]
    return {
        "kind": "train",
        "step": result.step,
        "time": time.time(),
        **result.summed,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        "step_s": result.step_s,
        "tokens_per_s": tokens_per_s,
        **flops.fields(tokens_per_s),
        "max_vio_batch": _mean(per_layer),
        "max_vio_batch_per_layer": per_layer,
        "max_vio_floor": _mean(floors),
        "max_vio_computation_batch": result.max_vio_computation_batch,
        "dead_experts": num_dead_experts(control.load_N),
        "bias_min": float(control.bias_N.min()) if layout.total else 0.0,
        "bias_max": float(control.bias_N.max()) if layout.total else 0.0,
        **{f"{phase}_s": seconds for phase, seconds in result.seconds.items()},
        "bias_update_s": control.bias_update_s,
        "control_wait_s": control.wait_s,
        "sent_bytes": result.sent_bytes,
        "bias_version": control.bias_version,
        "bias_checksum": f"{control.bias_checksum:08x}",
    }


def eval_line(
    step: int, evaluation: Evaluation, load_since_eval_N: Tensor, layout: LoadLayout, mix: tuple[float, ...]
) -> dict[str, Any]:
    """The line of an evaluation after `step`. `max_vio_global` is over all training tokens since the evaluation before.

    mix: weights of the sources in the batch of that step; empty where the text has no sources.
    """
    per_layer = max_vio_per_layer(load_since_eval_N, layout)
    load_N = evaluation.total_load
    held_out = max_vio_per_layer(load_N, layout)
    return {
        "kind": "eval",
        "step": step,
        "time": time.time(),
        "val_loss": evaluation.val_loss,
        "val_bits_per_byte": evaluation.val_bits_per_byte,
        "val_bits_per_byte_per_source": evaluation.val_bits_per_byte_per_source,
        # None at the first evaluation: no training has loaded an expert yet.
        "max_vio_global": _mean(per_layer) if load_since_eval_N.any() else None,
        "max_vio_global_per_layer": per_layer if load_since_eval_N.any() else None,
        # A layer that only training runs (multi-token prediction) has no held-out load.
        "max_vio_held_out": _mean(
            [vio for vio, experts in zip(held_out, layout.slices, strict=True) if load_N[experts].any()]
        ),
        "max_vio_held_out_per_layer": held_out,
        "max_vio_held_out_in_mix": _mean(_max_vio_in_mix(evaluation.load_SN, mix, layout)) if mix else None,
        "eval_s": evaluation.eval_s,
    }


def _max_vio_in_mix(load_SN: Tensor, mix: tuple[float, ...], layout: LoadLayout) -> list[float]:
    """MaxVio of each layer as it would be if the sources (S) had these shares of the held-out tokens.

    A source without held-out tokens adds no load. Layers without any load are left out.
    """
    shares_SN = load_SN.double() / load_SN.sum(1, keepdim=True).clamp_min(1)
    load_N = (torch.tensor(mix, dtype=torch.float64).unsqueeze(1) * shares_SN).sum(0)
    loads = [load_N[experts] for experts in layout.slices]
    return [float(load_E.max() / load_E.mean()) - 1 for load_E in loads if load_E.any()]


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0
