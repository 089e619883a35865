"""Training on packed conversations: the same as one by one, and the same for any layout of ranks."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from dispatch.balance import reset_counts
from tests.ranks import run_ranks
from tests.workers.model.test_decoder import build
from tests.workers.model.token_loss import token_nll_sum
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.data.prepare import prepare_dataset
from workers.data.shards import FIRST, TARGET
from workers.data.text import DataConfig
from workers.data.windows import NO_TARGET
from workers.model.attention import LatentConfig
from workers.model.decoder import Decoder
from workers.training.evaluation import evaluate
from workers.training.training_run import TrainingRun

KINDS = {"grouped_query": {}, "latent": {"attention": "latent", "latent": LatentConfig(query_rank=8, kv_rank=6)}}


def _gradients(model: Decoder) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_packed_documents_have_the_losses_and_gradients_of_documents_one_by_one() -> None:
    # Two rows of 12: documents of 5, 3, 4 and of 1, 11 tokens; targets inside documents alone.
    lengths = [(5, 3, 4), (1, 11)]
    token_ids = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    targets, starts = torch.full_like(token_ids, -100), torch.zeros_like(token_ids)
    for kind, settings in KINDS.items():
        model, losses = build(**settings).double(), []
        for row, row_lengths in enumerate(lengths):
            first = 0
            for length in row_lengths:
                document = token_ids[row : row + 1, first : first + length]
                targets[row, first : first + length - 1] = document[0, 1:]
                starts[row, first : first + length] = first
                loss = token_nll_sum(model(document[:, :-1]), document[:, 1:]) if length > 1 else torch.zeros(())
                losses.append(loss)
                first += length
        sum(losses).backward()
        wanted = _gradients(model)
        logits = model(token_ids, document_starts=starts)
        loss = token_nll_sum(logits, targets)
        torch.testing.assert_close(loss, sum(losses), rtol=1e-12, atol=0)
        loss.backward()
        found = _gradients(model)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-13, msg=f"{kind} {name}")
        # Without the documents' starts it is another function.
        assert not torch.allclose(token_nll_sum(model(token_ids), targets), loss)


def chat_data(folder) -> DataConfig:
    """Conversations of very different lengths, so that ranks and micro-batches differ in what they learn."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for index in range(60):
        question, answer = torch.randint(1, 14, (2,), generator=generator).tolist()
        lines.append({"prompt": f"{index}?" + "q" * question, "completion": "a" * answer})
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(path=str(folder / "chat.jsonl"), cache_dir=str(folder / "cache"), format="chat", val_fraction=0.3)


def _alone(state) -> tuple[float, float]:
    """Loss and gradient norm of the first step by one process that has all of it."""
    ids, targets, starts = state.sampler.batch(0, 0, 1)
    loss = token_nll_sum(state.model(ids, document_starts=starts), targets) / (targets != NO_TARGET).sum()
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()]).norm()
    state.model.zero_grad()
    reset_counts(state.routers)
    return loss.item(), norm.item()


def _steps(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, f"tuned-{spec.run.micro_batch_size}", float64=True)
    state = worker._state
    alone = _alone(state) if world_size == 1 else None
    with state.open_control() as control:
        run = TrainingRun(state, control, publish=print, stop_requested=worker._stop_requested)
        results = [run.trainer.step(step) for step in (1, 2, 3)]
    measured = evaluate(
        state.model,
        state.dataset,
        state.sampler,
        state.groups,
        batch_size=3,
        num_sequences=None,
        autocast=contextlib.nullcontext(),
    )
    shares = [int((state.sampler.batch(0, part, 12).targets != NO_TARGET).sum()) for part in range(12)]
    steps = [(result.summed["loss"], result.grad_norm) for result in results]
    return steps, whole_state(worker), (measured.val_loss, measured.num_tokens), shares, alone


def test_any_layout_of_ranks_and_micro_batches_learns_the_same_from_uneven_targets(tmp_path):  # B12
    spec = make_spec(tmp_path)
    dataset = prepare_dataset(chat_data(tmp_path))
    spec = replace(spec, data_dir=dataset.path)
    found = {}
    for world_size, micro_batch_size in ((1, 12), (2, 6), (2, 2), (4, 1)):
        sized = replace(spec, run=replace(spec.run, micro_batch_size=micro_batch_size))
        found[world_size, micro_batch_size] = run_ranks(world_size, _steps, sized)[0]
    steps, expected, measured, shares, alone = found.pop((1, 12))
    assert steps[0] == pytest.approx(alone, rel=1e-12)
    assert max(shares) > 1.5 * min(shares)  # else a mean of means would pass
    assert measured[1] == sum(int(((flags & TARGET > 0) & (flags & FIRST == 0)).sum()) for flags in dataset.val_flags)
    for layout, (other_steps, state, other_measured, *_) in found.items():
        assert [*other_steps, other_measured] == [pytest.approx(pair, rel=1e-9) for pair in [*steps, measured]]
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-10, msg=f"{layout} {name}")
