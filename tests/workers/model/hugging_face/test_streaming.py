"""A live model streamed through a pipe is what `trimtab export` writes of its checkpoint, with one tensor in memory."""

import json
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dispatch.errors import InvalidValue
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.local import LocalDispatcher
from runtime import stream_weights
from tests.ranks import run_ranks
from tests.workers.model.families.hugging_face import STACK
from tests.workers.training.test_gradients import form_groups
from workers.checkpoints import checkpoint
from workers.checkpoints.state import canonical_state
from workers.checkpoints.tensor_reader import TensorReader
from workers.distributed.parallel import RankGroups
from workers.model.decoder import Decoder
from workers.model.families import Settings, family_of
from workers.model.hugging_face.writing import BIAS, write_weights
from workers.model.init import init_weights
from workers.model.lora import LoraConfig
from workers.training.sharding import shard_states

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 20,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
V3 = COMMON | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": V3
    | {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10},
    # Queries and keys in another order than ours, in biases and norms too; without a layer of MTP.
    "glm4_moe": V3 | {"head_dim": 12, "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 0},
    # A bias with an axis more than ours, embeddings tied.
    "ernie4_5_moe": COMMON | {"moe_num_experts": 8, "moe_k": 2},
    "mixtral": COMMON | {"num_local_experts": 8},
    # Experts in stacks, which come whole.
    "gpt_oss": COMMON | {"num_local_experts": 8, "head_dim": 8, "rope_parameters": {"rope_theta": 150000.0}},
}
# Model, EP size of two ranks, sharding: experts divided, all replicated, dense tensors divided, all divided.
LAYOUTS = [
    ("deepseek_v3", 2, "none"),
    ("deepseek_v3", 1, "full"),
    ("glm4_moe", 2, "full"),
    ("ernie4_5_moe", 1, "none"),
    ("mixtral", 2, "none"),
    ("gpt_oss", 2, "none"),
    ("gpt_oss", 1, "full"),
]
ONE_HEAD = 12 * 32 * 4  # bytes, at most


def config_json(folder: Path, model_type: str) -> Path:
    file = folder / f"{model_type}.json"
    file.write_text(json.dumps(CONFIGS[model_type] | {"model_type": model_type}))
    return file


def build(file: Path, groups: RankGroups | None, shard: str = "none") -> Decoder:
    """Random weights; selection biases that bf16 cannot hold, but for the first layer's, where the family has any."""
    settings = Settings(json.loads(file.read_text()), str(file))
    family = family_of(settings)
    config = family.read_config(settings)
    num_experts = config.moe.num_experts
    alone = groups is None or groups.ep_size == 1
    with torch.device("meta"):
        dispatcher = LocalDispatcher(num_experts) if alone else AllToAllDispatcher(num_experts, groups.ep_group)
        model = Decoder(config, lambda: dispatcher)
    if groups is not None:
        shard_states(model, groups, shard)
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    biases = [tensor for name, tensor in model.named_buffers() if f".{name}".endswith(BIAS)]
    for bias in biases[family.has_bias :] if family.has_bias else ():
        bias.copy_(torch.linspace(-0.301, 0.401, num_experts))
    return model


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made under it and still are there, and the most that there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any]()
        for part in canonical_state(model).values():
            self._known.add(part.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, num_bytes)

    def _remove(self, num_bytes: int) -> None:
        self.now -= num_bytes


def send(pipe: BinaryIO, name: str, tensor: Tensor) -> None:
    header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": tuple(tensor.shape)}
    pipe.write(json.dumps(header).encode() + b"\n")
    pipe.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def write_what_comes(pipe: BinaryIO, file: Path) -> None:
    """The other end: all that it knows of the model comes through the pipe."""
    tensors = {}
    for line in pipe:
        header = json.loads(line)
        empty = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
        raw = bytearray(pipe.read(empty.nbytes))
        tensors[header["name"]] = torch.frombuffer(raw, dtype=empty.dtype).view(empty.shape)
    save_file(tensors, file)


def comes_true(condition: Callable[[], bool]) -> bool:
    """Within seconds: gloo's thread lets go of the tensor of a collective a moment after it is done."""
    give_up = time.monotonic() + 5
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.001)
    return condition()


def stream_to(pipe: BinaryIO, model: Decoder, file: Path, groups: RankGroups, dtype: Any) -> list[str]:
    """Send all through the pipe, and return the names in order. At most one streamed tensor is alive at any time."""
    names = []
    stream = stream_weights(model, file, groups.world_group, dtype=dtype)
    with LiveBytes(model) as live:
        while True:
            live.peak = live.now
            try:
                name, tensor = next(stream)
            except StopIteration:
                return names
            assert comes_true(lambda size=tensor.nbytes: live.now == size), name  # nothing else is left of making it
            of_experts = 3 * tensor.nbytes // 8 if STACK.search(name) else 0
            spare = of_experts if ".experts." in name else 3 * ONE_HEAD
            assert live.peak <= tensor.nbytes + spare, (name, live.peak, tensor.nbytes)
            sent = weakref.ref(tensor)
            send(pipe, name, tensor)
            names.append(name)
            del tensor
            assert comes_true(lambda sent=sent: sent() is None), name


def export_and_stream(rank: int, world_size: int, folder: Path) -> list[list[str]]:
    names = []
    for index, (model_type, ep_size, shard) in enumerate(LAYOUTS):
        groups, file = form_groups(rank, world_size, ep_size), folder / f"{model_type}.json"
        model, here = build(file, groups, shard), folder / str(index)
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))  # it leaves what the root of sharded states holds gathered
        if rank == 0:
            here.mkdir()
            (here / "export").mkdir()
        dist.barrier()
        saved = checkpoint.save(here / "checkpoints", 0, canonical_state(model), {"step": 0}, groups.world_group)
        parts = list(family_of(Settings(json.loads(file.read_text()), "")).parts(model.config))
        dtypes = {part.file_name: torch.bfloat16 for part in parts}
        if rank == 0:
            write_weights(here / "export", parts, dtypes, TensorReader(saved), max_file_bytes=30_000)
        read, write = os.pipe()
        received = here / "streamed" / str(rank) / "model.safetensors"
        received.parent.mkdir(parents=True)
        with os.fdopen(read, "rb") as source, os.fdopen(write, "wb") as sink:
            writer = threading.Thread(target=write_what_comes, args=(source, received))
            writer.start()
            try:
                names.append(stream_to(sink, model, file, groups, dtypes))
            finally:
                sink.close()
                writer.join()
    return names


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_what_comes_through_a_pipe_is_what_export_writes_with_one_tensor_in_memory(tmp_path: Path) -> None:
    for model_type in CONFIGS:
        config_json(tmp_path, model_type)
    first, second = run_ranks(2, export_and_stream, tmp_path)
    assert first == second  # in the same order everywhere
    for index, layout in enumerate(LAYOUTS):
        exported = tensors_of(tmp_path / str(index) / "export")
        num_stacks = sum(STACK.search(name) is not None for name in exported)
        assert num_stacks == 4 * 2 or sum(".experts." in name for name in exported) >= 3 * 8
        for rank in range(2):
            streamed = tensors_of(tmp_path / str(index) / "streamed" / str(rank))
            assert streamed.keys() == exported.keys() == set(first[index]), layout
            for name, tensor in exported.items():
                assert (tensor.dtype, tensor.shape) == (streamed[name].dtype, streamed[name].shape), (layout, name)
                assert torch.equal(tensor.view(torch.uint8), streamed[name].view(torch.uint8)), (layout, name)


def test_one_dtype_for_all_keeps_biases_in_fp32_and_leaves_copies_out(tmp_path: Path) -> None:
    file = config_json(tmp_path, "deepseek_v3")
    model = build(file, None)
    streamed = dict(stream_weights(model, file, None, dtype=torch.float16))
    biases = {name: tensor for name, tensor in streamed.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert {name for name, tensor in streamed.items() if tensor.dtype != torch.float16} == biases.keys()
    assert {tensor.dtype for tensor in biases.values()} == {torch.float32}
    # The layer of MTP has embedding and output again in the files of the hub.
    assert "model.layers.2.eh_proj.weight" in streamed
    assert "model.layers.2.embed_tokens.weight" not in streamed


def test_a_streamed_tensor_does_not_change_with_the_model(tmp_path: Path) -> None:
    file = config_json(tmp_path, "mixtral")
    model = build(file, None)
    streamed = dict(stream_weights(model, file, None, dtype=torch.float32))
    before = {name: tensor.clone() for name, tensor in streamed.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in before.items())


def test_what_would_lose_a_bias_or_another_model_is_refused_at_the_call(tmp_path: Path) -> None:
    file = config_json(tmp_path, "mixtral")
    model = build(file, None)
    with pytest.raises(InvalidValue, match="is not of this model"):
        stream_weights(model, config_json(tmp_path, "ernie4_5_moe"), None)
    with pytest.raises(InvalidValue, match="dtype has none for"):
        stream_weights(model, file, None, dtype={"model.norm.weight": torch.float32})
    model.layers[1].moe.router.expert_bias_E.fill_(0.5)
    with pytest.raises(InvalidValue, match=r"1 routers have a selection bias, the first is model\.layers\.1\.moe"):
        stream_weights(model, file, None)
    assert next(stream_weights(model, file, None, drop_bias=True))[0] == "model.embed_tokens.weight"


def test_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    file = config_json(tmp_path, "mixtral")
    model = build(file, None)
    object.__setattr__(model.config, "lora", LoraConfig(rank=2))
    with pytest.raises(InvalidValue, match=r"adapters \(model.lora.rank 2\).*--merged"):
        stream_weights(model, file, None)


def test_the_longest_sequence_and_recompute_may_be_the_runs_own(tmp_path: Path) -> None:
    file = config_json(tmp_path, "mixtral")
    model = build(file, None)
    model.config = replace(model.config, max_seq_len=16, recompute="full")
    assert next(stream_weights(model, file, None))[0] == "model.embed_tokens.weight"
