"""The verdict sees a weight, an optimizer state or a saved value that differs in the last bit."""

import time
from pathlib import Path

import torch

from runtime.commands.chaos.weights import EXTRA, checkpoint_digests, weight_flaws
from workers.checkpoints import checkpoint


def save(run: Path, step: int, *, moment: float = 0.25, seed: int = 5) -> Path:
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    tensors = {"model.norm.weight": weight, "optim.exp_avg.norm.weight": torch.tensor([moment, 0.5])}
    tensors["random.rank_0.cpu"] = torch.tensor([time.monotonic_ns()])  # which is another one in every process
    run.mkdir(exist_ok=True)
    checkpoint.save(run / "checkpoints", step, tensors, {"seed": seed}, None)
    return run


def test_equal_checkpoints_have_no_flaw_and_a_last_bit_is_seen(tmp_path):
    calm = checkpoint_digests(save(save(tmp_path / "calm", 4), 8))
    assert set(calm) == {4, 8} and set(calm[8]) == {"model.norm.weight", "optim.exp_avg.norm.weight", EXTRA}
    same = checkpoint_digests(save(tmp_path / "same", 8))
    assert weight_flaws(same, calm, 8) == {}
    nearly = float(torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)))
    other = checkpoint_digests(save(tmp_path / "other", 8, moment=nearly))
    assert weight_flaws(other, calm, 8) == {
        "checkpoint of step 8": "1 tensors differ, such as optim.exp_avg.norm.weight"
    }
    assert weight_flaws(checkpoint_digests(save(tmp_path / "extra", 8, seed=6)), calm, 8) == {
        "checkpoint of step 8": f"1 tensors differ, such as {EXTRA}"
    }


def test_the_last_checkpoint_must_be_there_and_whole(tmp_path):
    calm = checkpoint_digests(save(tmp_path / "calm", 8))
    early = checkpoint_digests(save(tmp_path / "early", 4))
    owed = {"checkpoint of step 8": "the struck run has none that is whole"}
    assert weight_flaws(early, calm, 8) == owed
    run = save(tmp_path / "damaged", 8)
    file = max((run / "checkpoints" / "step_00000008").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert weight_flaws(checkpoint_digests(run), calm, 8) == owed
