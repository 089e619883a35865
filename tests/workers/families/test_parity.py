"""Every family against transformers: logits, loss and all gradients, at EP 1, 2 and 4, padded in every way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import read_counts, routers_of
from dispatch.factory import make_dispatcher
from dispatch.meter import Meter
from dispatch.recycler import Recycler
from tests.ranks import run_ranks
from tests.workers.families.hugging_face import CONFIGS, Batch, Reference, reference
from workers.attention import positions_of
from workers.families import Settings, family_of
from workers.gradients import reduce_gradients
from workers.model import Decoder, token_nll_sum
from workers.parallel import ParallelConfig, RankGroups, join_groups
from workers.state import canonical_state

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(expected: Reference, groups: RankGroups) -> Decoder:
    family = family_of(Settings(expected.config, "config.json"))
    config = replace(family.read_config(Settings(expected.config, "config.json")), num_mtp_layers=0)
    moe = config.moe
    dispatcher = make_dispatcher(
        moe.num_experts, groups.ep_group, hidden=config.hidden, top_k=moe.top_k, meter=Meter(), recycler=Recycler()
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


def _compare(rank: int, world_size: int, folder: Path) -> None:
    dist.barrier()  # else a rank closes connections that another one is still making
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    groups = join_groups(
        rank=rank, world_size=world_size, store=store, config=ParallelConfig(), device=CPU, timeout_s=20.0
    )
    batch = Batch.ragged()
    for file in sorted(folder.glob("*.pt")):
        expected: Reference = torch.load(file, weights_only=False)
        model = build(expected, groups)
        mine = slice(rank, None, world_size)
        token_ids, mask, labels = batch.token_ids[mine], batch.mask[mine], batch.labels[mine]
        logits = model(token_ids, token_mask=mask, positions=positions_of(mask))
        close(logits[mask], expected.logits[mine][mask], f"{file.stem} logits")
        loss = token_nll_sum(logits[:, :-1], labels[:, 1:]) / (batch.labels != -100).sum()
        loss.backward()
        total = loss.detach().double()
        dist.all_reduce(total, group=groups.control_group)
        assert total.item() == pytest.approx(expected.loss, rel=TOLERANCES[expected.logits.dtype])
        reduce_gradients(model, groups)
        load = read_counts(routers_of(model))
        assert load.sum() == mask.sum() * len(routers_of(model)) * model.config.moe.top_k  # padding is not counted
        for name, gradient in gradients_by_hub_name(model, expected.config).items():
            close(gradient, expected.gradients[name], f"{file.stem} gradient of {name}")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for name in CONFIGS:
        for dtype in TOLERANCES:
            torch.save(reference(name, dtype, Batch.ragged()), folder / f"{name} {dtype}.pt")
    return folder


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_logits_loss_and_all_gradients_equal_those_of_transformers(ep_size: int, references: Path) -> None:
    run_ranks(ep_size, _compare, references)
