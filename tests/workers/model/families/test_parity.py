"""Every family against transformers: logits, loss and all gradients, at EP 1, 2 and 4, padded in every way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import read_counts, routers_of
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.factory import make_dispatcher
from tests.ranks import run_ranks
from tests.workers.model.families.hugging_face import CONFIGS, Batch, Reference, reference, text_settings
from tests.workers.model.token_loss import token_nll_sum
from workers.checkpoints.state import canonical_state
from workers.distributed.parallel import ParallelConfig, RankGroups, join_groups
from workers.model.attention import positions_of
from workers.model.decoder import Decoder
from workers.model.families import Settings, family_of
from workers.training.gradients import reduce_gradients

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(expected: Reference, groups: RankGroups) -> Decoder:
    family = family_of(Settings(expected.config, "config.json"))
    config = replace(family.read_config(Settings(expected.config, "config.json")), num_mtp_layers=0)
    moe = config.moe
    dispatcher = make_dispatcher(
        moe.num_experts, groups.ep_group, hidden=config.hidden, top_k=moe.top_k, meter=Meter(), buffer_pool=BufferPool()
    )
    model = Decoder(config, lambda: dispatcher).to(expected.logits.dtype)
    state, parts = canonical_state(model), list(family.parts(config))
    assert {part.name for part in parts} == expected.weights.keys()
    for part in parts:
        if f"model.{part.target}" in state:
            part.rows_of(state[f"model.{part.target}"]).copy_(part.to_ours(expected.weights[part.name]))
    return model


def gradients_by_hub_name(model: Decoder, config: dict) -> dict[str, torch.Tensor]:
    """Of what this rank holds."""
    family = family_of(Settings(config, "config.json"))
    grads = {id(parameter): parameter.grad for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = grads[id(parameter)]
    state = canonical_state(model)
    return {
        part.name: part.to_theirs(part.rows_of(state[f"model.{part.target}"]))
        for part in family.parts(model.config)
        if f"model.{part.target}" in state and "expert_bias" not in part.target
    }


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def gangs(rank: int, world_size: int, folder: Path, purpose: str) -> Iterator[tuple[RankGroups, list[Path]]]:
    """This rank alone with its share of the files in `folder`, then all ranks with all: two sizes in one launch."""
    files = sorted(folder.glob("*.pt"))
    dist.barrier()  # else a rank closes connections that another one is still making
    for name, size, chosen in ((f"alone-{rank}", 1, files[rank::world_size]), ("together", world_size, files)):
        dist.destroy_process_group()
        store = dist.FileStore(str(folder / f"store-{purpose}-{world_size}-{name}"), size)
        config = ParallelConfig()
        yield (
            join_groups(rank=rank % size, world_size=size, store=store, config=config, device=CPU, timeout_s=60.0),
            chosen,
        )


def _compare_all(rank: int, world_size: int, folder: Path) -> None:
    for groups, files in gangs(rank, world_size, folder, "parity"):
        for file in files:
            _compare(torch.load(file, weights_only=False)[0], groups, file.stem)


def _compare(expected: Reference, groups: RankGroups, name: str) -> None:
    batch = Batch.ragged()
    model = build(expected, groups)
    mine = slice(groups.rank, None, groups.world_size)
    token_ids, mask, labels = batch.token_ids[mine], batch.mask[mine], batch.labels[mine]
    logits = model(token_ids, token_mask=mask, positions=positions_of(mask))
    close(logits[mask], expected.logits[mine][mask], f"{name} logits")
    loss = token_nll_sum(logits[:, :-1], labels[:, 1:]) / (batch.labels != -100).sum()
    loss.backward()
    total = loss.detach().double()
    dist.all_reduce(total, group=groups.control_group)
    assert total.item() == pytest.approx(expected.loss, rel=TOLERANCES[expected.logits.dtype])
    reduce_gradients(model, groups)
    load = read_counts(routers_of(model))
    assert load.sum() == mask.sum() * len(routers_of(model)) * model.config.moe.top_k  # padding is not counted
    for key, gradient in gradients_by_hub_name(model, expected.config).items():
        close(gradient, expected.gradients[key], f"{name} gradient of {key}")


@pytest.mark.parametrize("ep_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_logits_loss_and_all_gradients_equal_those_of_transformers(ep_size: int, in_float64: Path) -> None:
    run_ranks(ep_size, _compare_all, in_float64)  # and each alone, at EP 1


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [2, 4])
def test_they_are_equal_in_float32_too(ep_size: int, tmp_path: Path) -> None:
    for name in CONFIGS:
        torch.save((reference(name, torch.float32, Batch.ragged()), None), tmp_path / f"{name}.pt")
    run_ranks(ep_size, _compare_all, tmp_path)


@pytest.mark.slow
def test_ten_experts_on_three_ranks_and_on_four(tmp_path: Path) -> None:
    for name in CONFIGS:
        config = text_settings(name)
        odd = {key: 10 for key in config if key.endswith("_experts") and "shared" not in key}
        if config.get("n_group", 1) > 1:
            odd["n_group"] = 5
        expected = reference(name, torch.float64, Batch.ragged(), hidden_size=48, **odd)
        torch.save((expected, None), tmp_path / f"{name}.pt")
    for ep_size in (3, 4):
        run_ranks(ep_size, _compare_all, tmp_path)
