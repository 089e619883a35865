"""Compares the weights and optimizer state of two runs, tensor by tensor, bit for bit."""

import hashlib
import json
from pathlib import Path

import torch

from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointError, list_checkpoints, step_of
from workers.checkpoints.tensor_reader import TensorReader

EXTRA = "values beside the tensors"

Digests = dict[str, str]


def checkpoint_digests(run: Path) -> dict[int, Digests]:
    """By step, the digest of every tensor of a checkpoint by its name; empty for a damaged checkpoint."""
    return {step_of(path): _digests(path) for path in list_checkpoints(run / CHECKPOINTS)}


def weight_flaws(found: dict[int, Digests], calm: dict[int, Digests], last_step: int) -> dict[str, str]:
    """What differs in the checkpoints of steps that both runs have. That of the last step must be among them."""
    problems = {}
    for step in sorted({*(found.keys() & calm.keys()), last_step}):
        ours, theirs = found.get(step, {}), calm.get(step, {})
        if not ours or not theirs:
            whose = "the struck run" if not ours else "the calm run"
            problems[f"checkpoint of step {step}"] = f"{whose} has none that is whole"
        elif names := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            problems[f"checkpoint of step {step}"] = f"{len(names)} tensors differ, such as {names[0]}"
    return problems


def _digests(path: Path) -> Digests:
    try:
        reader = TensorReader(path)
    except CheckpointError:
        return {}
    # Not torch's own generators: training draws nothing from them, and each process seeds its own by chance.
    tensors = reader.read(name for name in reader.shapes if not name.startswith("random."))
    found = {
        name: hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + _bytes(t)).hexdigest()
        for name, t in tensors.items()
    }
    extra = json.dumps(reader.manifest.extra, sort_keys=True).encode()
    return found | {EXTRA: hashlib.sha256(extra).hexdigest()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
