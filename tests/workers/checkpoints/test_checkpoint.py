"""Checkpoints: one file set that any number of ranks reads, or an error on all ranks.

Most tests fill every tensor with values drawn from its canonical name, so that a reader at any EP size knows what each
expert must hold without talking to the ranks that wrote it.
"""

import errno
import functools
import json
import os
import pickle
import resource
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dispatch.balance import LossFreeBalancer, read_bias, routers_of
from dispatch.config import MoEConfig
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.experts.stacked import expert_parameters
from dispatch.laws import BalanceConfig, LawState
from tests.ranks import run_ranks
from tests.workers.model.token_loss import token_nll
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint import load, save, verify
from workers.checkpoints.checkpoint_files import (
    CheckpointCorrupt,
    CheckpointError,
    DiskRefused,
    latest,
    list_checkpoints,
    read_manifest,
    set_aside_later,
    step_of,
)
from workers.checkpoints.dcp import write_share
from workers.checkpoints.index import read_index
from workers.checkpoints.state import canonical_state, law_state, law_tensors, random_state, set_random_state
from workers.model.decoder import Decoder
from workers.model.model_config import ModelConfig
from workers.training.optimizer import OptimConfig

NUM_EXPERTS = 8
CONFIG = ModelConfig(
    vocab_size=17,
    hidden=8,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=8,
    max_seq_len=8,
    moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=2, ffn_hidden=4),
)
CPU = torch.device("cpu")
state_of = functools.partial(canonical_state, initial_state=OptimConfig().entry.initial_state)


def _model_and_optimizer(ep_group=None):
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(NUM_EXPERTS) if ep_group is None else AllToAllDispatcher(NUM_EXPERTS, ep_group)
    model = Decoder(CONFIG, lambda: dispatcher)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def _value_of(name, tensor):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def _fill(tensors):
    for name, tensor in tensors.items():
        tensor.copy_(_value_of(name, tensor))
    return tensors


def _wrong(tensors):
    return [name for name, tensor in tensors.items() if not torch.equal(tensor, _value_of(name, tensor))]


def _save_filled(root, step, keep=3):
    return save(root, step, _fill(state_of(*_model_and_optimizer())), {"seed": 7}, None, keep)


# --- names


def test_every_expert_is_named_by_its_global_id():
    state = state_of(*_model_and_optimizer())
    for section in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
        for expert_id in range(NUM_EXPERTS):
            assert state[f"{section}.layers.2.moe.experts.{expert_id}.gate_up_proj"].shape == (8, 8)
    assert state["optim.step.layers.2.moe.experts.gate_up_proj"].shape == ()
    assert not [name for name in state if "tokens_per_expert" in name]  # zero between steps


def test_canonical_names_are_the_same_under_wrappers():  # B28
    model, optimizer = _model_and_optimizer()
    plain = state_of(model, optimizer).keys()

    class Wrapper(torch.nn.Module):  # what torch's checkpoint_wrapper and torch.compile do to names
        def __init__(self, attribute, inner):
            super().__init__()
            setattr(self, attribute, inner)

    model.layers[0] = Wrapper("_checkpoint_wrapped_module", model.layers[0])
    model.layers[2].moe.experts = Wrapper("_checkpoint_wrapped_module", model.layers[2].moe.experts)
    assert state_of(Wrapper("_orig_mod", model), optimizer).keys() == plain


def test_state_is_a_view_of_the_live_tensors():  # B24
    model, optimizer = _model_and_optimizer()
    _fill(state_of(model, optimizer))
    name = "layers.1.moe.experts.5.gate_up_proj"
    experts = model.get_submodule("layers.1.moe.experts")
    assert torch.equal(experts.gate_up_proj[5], _value_of(f"model.{name}", experts.gate_up_proj[5]))
    moment = optimizer.state[experts.gate_up_proj]["exp_avg"][5]
    assert torch.equal(moment, _value_of(f"optim.exp_avg.{name}", moment))
    router = model.get_submodule("layers.1.moe.router")
    assert torch.equal(router.expert_bias_E, _value_of("model.layers.1.moe.router.expert_bias_E", router.expert_bias_E))


def test_moments_made_before_the_first_step_change_nothing():
    models = []
    for early in (False, True):
        model, optimizer = _model_and_optimizer()
        if early:
            state_of(model, optimizer)
        _train(model, optimizer, None, range(2))
        models.append(state_of(model, optimizer))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="not in the model"):
        state_of(_model_and_optimizer()[0], _model_and_optimizer()[1])


# --- round trips


def _ep_group(rank, world_size, ep_size):
    groups = [dist.new_group(list(range(at, at + ep_size))) for at in range(0, world_size, ep_size)]
    return groups[rank // ep_size] if ep_size < world_size else dist.group.WORLD


def _save_over_world(rank, world_size, root, step, ep_size):
    tensors = _fill(state_of(*_model_and_optimizer(_ep_group(rank, world_size, ep_size))))
    save(root, step, tensors, {"seed": 7}, dist.group.WORLD, keep=9)


def _load_all(rank, world_size, root):
    wrong = {}
    for path in list_checkpoints(root):
        model, optimizer = _model_and_optimizer(dist.group.WORLD)
        tensors = state_of(model, optimizer)
        storage = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        extra = load(path, tensors, dist.group.WORLD)
        moved = [name for name, tensor in model.state_dict().items() if tensor.data_ptr() != storage[name]]
        live = state_of(model, optimizer)
        bias = read_bias(routers_of(model))
        wrong[step_of(path)] = _wrong(live) + moved + ([] if extra == {"seed": 7} else ["extra"])
        assert bias.dtype == torch.float32
        assert int((bias != 0).sum()) == 2 * NUM_EXPERTS
    return wrong


@pytest.fixture(scope="module")
def saved_at_every_size(tmp_path_factory):
    """step -> saved by: 1 to 4 ranks with the experts spread over all; 5: EP 2 on 4 ranks, each shard held twice."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step, world_size, ep_size in [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4), (5, 4, 2)]:
        run_ranks(world_size, _save_over_world, root, step, ep_size)
    return root


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_ep_size_reads_what_any_other_wrote(saved_at_every_size, world_size):  # B23, B25, B30, parity 20
    for wrong in run_ranks(world_size, _load_all, saved_at_every_size):
        assert wrong == {1: [], 2: [], 3: [], 4: [], 5: []}


def test_every_expert_is_in_the_files_once(saved_at_every_size):  # B30
    for path in list_checkpoints(saved_at_every_size):
        index = read_index(path, read_manifest(path).files)
        for layer in (1, 2):
            experts = [n for n in index.state_dict_metadata if n.startswith(f"model.layers.{layer}.moe.experts.")]
            assert len([n for n in experts if n.endswith(".gate_up_proj")]) == NUM_EXPERTS
        assert all(len(entry.chunks) == 1 for entry in index.state_dict_metadata.values())
        assert len(index.storage_data) == len(index.state_dict_metadata)


def _save_by_local_id(rank, world_size, root):
    tensors = {}
    for name, tensor in state_of(_model_and_optimizer(dist.group.WORLD)[0]).items():
        parts = name.split(".")
        if parts[-2].isdigit():
            parts[-2] = str(int(parts[-2]) % 4)  # the mistake: the index on this rank
        tensors[".".join(parts)] = tensor
    with pytest.raises(CheckpointError, match=r"without all of its experts.*experts .0, 1, 2, 3., its router has 8"):
        save(root, 1, tensors, {}, dist.group.WORLD)


def test_experts_named_by_local_id_are_refused(tmp_path):  # B30
    run_ranks(2, _save_by_local_id, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _different_shapes(rank, world_size, root):
    with pytest.raises(CheckpointError, match=r"model.x is float32 \(3,\) on rank 1 and float32 \(2,\)"):
        save(root, 1, {"model.x": torch.zeros(2 + rank)}, {}, dist.group.WORLD)


def test_one_name_for_two_tensors_is_refused(tmp_path):
    run_ranks(2, _different_shapes, tmp_path)


def _train(model, optimizer, group, steps):
    """A training loop of `steps` with the bias moving; returns its losses."""
    balancer = LossFreeBalancer(model, BalanceConfig(law="sign", rate=0.1), group)
    balancer.state = LawState(read_bias(routers_of(model)))
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    of_experts = {id(parameter) for parameter in expert_parameters(model).values()}
    losses = []
    for step in steps:
        tokens = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        loss = token_nll(model(tokens[:, :-1]), tokens[:, 1:]).sum() / 32
        loss.backward()
        for parameter in model.parameters():
            if group is not None and id(parameter) not in of_experts:
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        losses.append(loss.item())
    return losses


def _train_save_train(rank, world_size, root):
    group = dist.group.WORLD
    model, optimizer = _model_and_optimizer(group)
    _train(model, optimizer, group, range(3))
    save(root, 3, state_of(model, optimizer), {}, group)
    expected = _train(model, optimizer, group, range(3, 6)), state_of(model, optimizer)

    model, optimizer = _model_and_optimizer(group)
    load(root / "step_00000003", state_of(model, optimizer), group)
    resumed = _train(model, optimizer, group, range(3, 6)), state_of(model, optimizer)
    assert resumed[0] == expected[0]
    assert [name for name in expected[1] if not torch.equal(expected[1][name], resumed[1][name])] == []
    assert read_bias(routers_of(model)).abs().max() > 0


def test_three_more_steps_after_a_restart_are_bit_identical(tmp_path):  # B24, B25, parity 20
    run_ranks(2, _train_save_train, tmp_path)


def test_law_state_comes_back_whole(tmp_path):  # B26
    state = LawState(torch.tensor([0.5, -0.5]), {"momentum": torch.ones(2), "seen": torch.tensor([3])})
    path = save(tmp_path, 1, law_tensors(state), {}, None)
    fresh = law_tensors(LawState(torch.zeros(2), {"momentum": torch.zeros(2), "seen": torch.tensor([0])}))
    load(path, fresh, None)
    again = law_state(fresh)
    assert again.to_wire() == state.to_wire()
    with pytest.raises(CheckpointError, match=r"1 tensors in it have no place here, such as law\.extras\.seen"):
        load(path, law_tensors(LawState(torch.zeros(2), {"momentum": torch.zeros(2)})), None)


def _random(rank, world_size, root, step):
    torch.manual_seed(100 + rank)
    path = root / f"step_{step:08d}"
    if not path.exists():
        save(root, step, random_state(rank, CPU), {}, dist.group.WORLD)
        return torch.rand(3).tolist()
    torch.manual_seed(200 + rank)
    states = random_state(rank, CPU)
    load(path, states, dist.group.WORLD)
    set_random_state(states, rank, CPU)
    return torch.rand(3).tolist()


def test_random_generators_continue_only_on_as_many_ranks(tmp_path):
    first = run_ranks(2, _random, tmp_path, 1)
    assert run_ranks(2, _random, tmp_path, 1) == first
    alone = run_ranks(1, _random, tmp_path, 1)
    assert alone[0] == torch.rand(3, generator=torch.Generator().manual_seed(200)).tolist()


def test_a_model_can_be_read_without_its_optimizer(tmp_path):
    path = _save_filled(tmp_path, 1)
    tensors = state_of(_model_and_optimizer()[0])
    load(path, tensors, None, sections=("model",))
    assert _wrong(tensors) == []
    with pytest.raises(CheckpointError, match="have no place here, such as optim"):
        load(path, tensors, None)


# --- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"model.extra": torch.zeros(1)}), "1 tensors are not in it, such as model.extra"),
        (lambda state: state.pop("model.norm.weight"), "1 tensors in it have no place here, such as model.norm.weight"),
        (
            lambda state: state.pop("model.layers.1.moe.experts.7.gate_up_proj"),
            "1 tensors in it have no place here, such as model.layers.1.moe.experts.7.gate_up_proj",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(9)}),
            r"model.norm.weight: float32 \(8,\) in it, float32 \(9,\) here",
        ),
        (  # B23: the bias must stay fp32; a cast would pass in silence
            lambda state: state.update(
                {"model.layers.1.moe.router.expert_bias_E": torch.zeros(8, dtype=torch.bfloat16)}
            ),
            r"expert_bias_E: float32 \(8,\) in it, bfloat16 \(8,\) here",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, change, message):  # B23
    path = _save_filled(tmp_path, 1)
    tensors = state_of(*_model_and_optimizer())
    change(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        load(path, tensors, None)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


# --- damage


def _truncate(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(name):
    def flip(path):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return flip


def _change_extra(path):
    text = (path / "manifest.json").read_text()
    assert '"seed": 7' in text
    (path / "manifest.json").write_text(text.replace('"seed": 7', '"seed": 8'))


DAMAGES = {
    "truncated": (_truncate, "__0_0.distcp has .* bytes, not the .* that were written"),
    "deleted": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "deleted index": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "flipped": (_flip("__0_0.distcp"), "__0_0.distcp has other bytes"),
    "flipped index": (_flip(".metadata"), ".metadata has other bytes"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "changed manifest": (_change_extra, "manifest.json was changed"),
}


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("my-run")
    for step in (10, 20, 30):
        _save_filled(root, step)
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_intact_one_before_offered(three_checkpoints, tmp_path, damage):
    root = Path(shutil.copytree(three_checkpoints, tmp_path / "my-run" / "checkpoints"))
    paths = list_checkpoints(root)
    hurt, message = DAMAGES[damage]
    hurt(paths[1])
    hurt(paths[2])
    tensors = state_of(*_model_and_optimizer())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointCorrupt, match=f"{message}.*--resume {root.parent} --step 10") as caught:
        load(paths[2], tensors, None)
    assert (caught.value.path, caught.value.previous) == (paths[2], paths[0])
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointCorrupt):
        verify(paths[1])
    assert verify(paths[0]).extra == {"seed": 7}
    assert list_checkpoints(root) == paths  # damage is reported, not passed over


def _load_damaged(rank, world_size, path):
    with pytest.raises(CheckpointCorrupt) as caught:
        load(path, state_of(*_model_and_optimizer(dist.group.WORLD)), dist.group.WORLD)
    return str(caught.value), caught.value.previous


def test_damage_seen_by_one_rank_is_an_error_on_all(tmp_path):
    for step in (1, 2):
        run_ranks(2, _save_over_world, tmp_path, step, 2)
    _flip("__1_0.distcp")(tmp_path / "step_00000002")
    (first, previous), second = run_ranks(2, _load_damaged, tmp_path / "step_00000002")
    assert (first, previous) == second
    assert "__1_0.distcp has other bytes" in first
    assert previous == tmp_path / "step_00000001"


def test_a_step_that_is_not_there_names_those_that_are(tmp_path):
    _save_filled(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step_00000011; steps that are there: 10"):
        load(tmp_path / "step_00000011", {}, None)


def test_errors_survive_pickling():
    error = CheckpointCorrupt(Path("a/step_00000002"), "f", "is missing", Path("a/step_00000001"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.previous) == (str(error), error.previous)


# --- saving that fails, and what stays


def _fill_the_disk_of_rank_1(rank, world_size, root):
    state = {f"model.{name}": torch.full((1000,), float(name)) for name in range(100)}
    group = dist.group.WORLD
    save(root, 1, state, {}, group)
    if rank == 1:
        # A write beyond this size fails the way a full disk does. Not lower: the ranks' own small files must pass.
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        save(root, 2, state, {}, group)
    return str(caught.value)


def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_earlier_one(tmp_path):
    messages = run_ranks(2, _fill_the_disk_of_rank_1, tmp_path)
    assert messages[0] == messages[1]
    assert "failed on rank 1" in messages[0]
    assert [file.name for file in tmp_path.iterdir()] == ["step_00000001"]
    verify(tmp_path / "step_00000001")


def test_a_bug_in_a_save_is_no_full_disk_and_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(torch, "save", bug)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        save(tmp_path, 1, {"model.x": torch.zeros(2)}, {}, None)
    assert not isinstance(caught.value, CheckpointError)
    assert "bug" in [entry.name for entry in caught.traceback]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "waits"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EIO, True), (errno.ENOENT, False)]
)
def test_what_the_system_answered_under_torchs_writer_decides_whether_to_wait(tmp_path, monkeypatch, number, waits):
    def refuse(_data, _file):
        try:
            raise OSError(number, os.strerror(number))
        finally:  # torch's writer tells another error, without a cause
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(CheckpointError, match=os.strerror(number)) as caught:
        save(tmp_path, 1, {"model.x": torch.zeros(2)}, {}, None)
    assert isinstance(caught.value, DiskRefused) == waits
    assert isinstance(caught.value.__cause__, OSError)


def test_a_run_directory_that_was_moved_away_does_not_come_back(tmp_path):
    run = tmp_path / "moved_away"
    with pytest.raises(CheckpointError, match=r"preparing .* failed on rank 0: FileNotFoundError") as caught:
        save(run / "checkpoints", 1, {"model.x": torch.zeros(2)}, {}, None)
    assert not isinstance(caught.value, DiskRefused)  # it is not waited for
    assert not run.exists()


@pytest.mark.parametrize("free", [0, 3_000_000])
def test_an_error_of_torchs_writer_without_one_of_the_system_is_a_full_disk_only_if_it_is_full(
    tmp_path, monkeypatch, free
):
    rooms = iter([3_000_000, free])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(rooms)))

    def refuse(_data, _file):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(RuntimeError) as caught:
        save(tmp_path, 1, {"model.x": torch.zeros(2)}, {}, None)
    assert isinstance(caught.value, DiskRefused) == (free == 0)


def test_dcp_itself_reads_what_was_written(tmp_path):
    path = save(tmp_path, 1, {"model.x": torch.arange(6.0).view(2, 3), "model.n": torch.tensor(7)}, {}, None)
    tensors = {"model.x": torch.zeros(2, 3), "model.n": torch.tensor(0)}
    dcp_load(tensors, checkpoint_id=path, no_dist=True)
    assert (tensors["model.x"].tolist(), tensors["model.n"].item()) == ([[0, 1, 2], [3, 4, 5]], 7)


def test_a_file_that_rank_0_sees_shorter_than_it_was_written_is_no_checkpoint(tmp_path, monkeypatch):
    def write_half(folder, tensors, rank):
        written = write_share(folder, tensors, rank)
        for name, (size, _) in written.files.items():
            os.truncate(folder / name, size // 2)
        return written

    monkeypatch.setattr(checkpoint, "write_share", write_half)
    with pytest.raises(CheckpointError, match=r"not in .*as the ranks wrote them.*do all machines see this folder"):
        _save_filled(tmp_path / "checkpoints", 1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with pytest.raises(CheckpointError, match=r"needs 4.0 MB, 3.0 MB are free in .*; free some space"):
        save(tmp_path, 1, {"model.x": torch.zeros(1_000_000)}, {}, None)
    assert list(tmp_path.iterdir()) == []


def test_extra_that_is_not_json_is_refused_and_nothing_is_left(tmp_path):
    for extra in ({"state": b"bytes"}, {"loss": float("nan")}):
        with pytest.raises(CheckpointError, match="JSON"):
            save(tmp_path, 1, {"model.x": torch.zeros(2)}, extra, None)
    assert list(tmp_path.iterdir()) == []


def test_extra_comes_back_as_json_gives_it(tmp_path):
    extra = {"step": 3, "rates": [0.1, 1e-300], "by_layer": {10: 1, 2: 2}, "none": None}
    path = save(tmp_path, 1, {"model.x": torch.zeros(2)}, extra, None)
    assert load(path, {"model.x": torch.ones(2)}, None) == json.loads(json.dumps(extra))


def test_what_a_killed_save_left_is_never_read_and_removed_by_the_next(tmp_path):
    _save_filled(tmp_path, 1)
    leftover = tmp_path / ".step_00000002.partial"
    shutil.copytree(tmp_path / "step_00000001", leftover)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1]
    _save_filled(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100_000_000, 15):
        _save_filled(tmp_path, step, keep=2)
    # 15 keeps itself and 10. 100,000,000 is of an abandoned history: not newer than 15, and not 15's to remove.
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10, 15, 100_000_000]
    with pytest.raises(ValueError, match="keep"):
        _save_filled(tmp_path, 16, keep=0)


def test_a_step_saved_again_replaces_the_first(tmp_path):
    for value in (1.0, 2.0):
        path = save(tmp_path, 1, {"model.x": torch.full((2,), value)}, {"value": value}, None)
    x = torch.zeros(2)
    assert load(path, {"model.x": x}, None) == {"value": 2.0}
    assert x.tolist() == [2.0, 2.0]
    assert [file.name for file in tmp_path.iterdir()] == ["step_00000001"]


def test_resuming_sets_later_checkpoints_aside(tmp_path):
    assert latest(tmp_path / "none") is None
    for step in (10, 20, 30):
        _save_filled(tmp_path, step)
    assert latest(tmp_path) == tmp_path / "step_00000030"
    for _ in range(2):
        set_aside_later(tmp_path, 10)
        assert latest(tmp_path) == tmp_path / "step_00000010"
        assert (tmp_path / "superseded_step_00000030").is_dir()
        _save_filled(tmp_path, 20)
    verify(latest(tmp_path))


def test_a_frozen_parameter_has_no_moments():
    model, optimizer = _model_and_optimizer()
    model.norm.weight.requires_grad_(False)
    state = state_of(model, optimizer)
    assert "model.norm.weight" in state
    assert "optim.exp_avg.norm.weight" not in state
