"""The layer of multi-token prediction: its loss, its gradients, its way in and out, and in training."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispatch.balance import read_counts, routers_of
from dispatch.exchange.local import LocalDispatcher
from runtime.cli import main
from tests.workers.model.families.directories import PREFIX, make_mtp, mtp_names, write_directory, write_with_mtp
from tests.workers.model.families.hugging_face import VOCAB_SIZE, Widened, hub_names, make_model
from tests.workers.model.token_loss import token_nll_sum
from workers.checkpoints.state import canonical_state
from workers.model.decoder import Decoder
from workers.model.families import FAMILIES, Settings
from workers.model.hugging_face.filling import fill
from workers.model.hugging_face.source import SourceError, open_source
from workers.model.loss import after_next

WEIGHT = 0.3


def their_loss_and_gradients(
    name: str, token_ids: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    with Widened():
        model = make_model(name, torch.float64)
        mtp = make_mtp(model, torch.float64)
        hidden = model.model(input_ids=token_ids).last_hidden_state
        positions = torch.arange(token_ids.shape[1]).unsqueeze(0)
        embedded = mtp.embed_tokens(targets)
        causal = torch.full((1, 1, token_ids.shape[1], token_ids.shape[1]), -torch.inf, dtype=torch.float64).triu(1)
        places = mtp.rotary_emb(embedded, position_ids=positions)
        further = mtp.layers[0](embedded, hidden, places, causal, positions, None)
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss + WEIGHT * F.cross_entropy(
            mtp.shared_head(further)[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
    weights = hub_names(model, model.state_dict()) | mtp_names(mtp, mtp.state_dict())
    gradients = hub_names(model, {name: value.grad for name, value in model.named_parameters()})
    gradients |= mtp_names(mtp, {name: value.grad for name, value in mtp.named_parameters()})
    return weights, loss.detach(), gradients


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_its_loss_and_all_gradients_equal_those_of_transformers(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCAB_SIZE, (3, 10), generator=generator)
    token_ids, targets = text[:, :-1], text[:, 1:]
    weights, loss, gradients = their_loss_and_gradients(name, token_ids, targets)
    family = FAMILIES[name]
    settings = Settings(make_model(name).config.to_dict(), "config.json")
    config = family.read_config(settings)
    assert config.num_mtp_layers == 1
    model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts)).double()
    state = canonical_state(model)
    parts = [part for part in family.parts(config) if not part.is_copy]
    assert {part.name for part in parts} == weights.keys()
    for part in parts:
        part.rows_of(state[f"model.{part.target}"]).copy_(part.to_ours(weights[part.name]))
    logits, further = model(token_ids, next_ids=targets)
    assert further is not None
    ours = token_nll_sum(logits, targets) + WEIGHT * token_nll_sum(further, after_next(targets))
    torch.testing.assert_close(ours, loss, rtol=1e-10, atol=0)
    ours.backward()
    # Its MoE layer is balanced like the others: its tokens are counted.
    counts = read_counts(routers_of(model))
    assert len(routers_of(model)) == 3
    assert counts.view(3, -1).sum(1).tolist() == [27 * config.moe.top_k] * 3
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    state = canonical_state(model)
    for part in parts:
        if "expert_bias" not in part.target:
            actual = part.to_theirs(part.rows_of(state[f"model.{part.target}"]))
            torch.testing.assert_close(actual, gradients[part.name], rtol=1e-10, atol=1e-10, msg=part.name)
    # Without next tokens it takes no part.
    torch.testing.assert_close(model(token_ids), logits * 0 + model(token_ids, next_ids=targets)[0])


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "without copies"])
def test_its_tensors_come_back_byte_for_byte(copies: bool, tmp_path: Path) -> None:
    source = write_with_mtp(tmp_path / "source", copies=copies)
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", str(source), str(run), "--workers", "1", "--model.max_seq_len", "16"]) == 0
    assert main(["export", str(run), str(out)]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert any(name.startswith(PREFIX) for name in before)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_a_copy_that_differs_is_named(tmp_path: Path) -> None:
    folder = write_with_mtp(tmp_path / "source", copies=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PREFIX}.shared_head.head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    state = canonical_state(Decoder(source.config, lambda: LocalDispatcher(16)))
    with pytest.raises(SourceError, match=rf"{PREFIX}.shared_head.head.weight is not equal to what fills lm_head"):
        fill(state, source)


def test_a_second_layer_is_refused(tmp_path: Path) -> None:
    folder = write_with_mtp(tmp_path / "source", copies=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    with pytest.raises(ValueError, match=r"num_mtp_layers \(2\) must be 0 or 1"):
        open_source(folder)


@pytest.mark.parametrize(
    ("name", "of_mtp"),
    [("exaone_moe", "mtp.layers.0"), ("hy_v3", "model.layers.3"), ("ernie4_5_moe", "model.mtp_block.0")],
)
def test_one_that_cannot_be_read_is_left_out(name: str, of_mtp: str, tmp_path: Path) -> None:
    folder = write_directory(tmp_path, name)
    whole = open_source(folder)
    tensors = load_file(folder / "model.safetensors")
    further = {f"{of_mtp}.{part}.weight": torch.zeros(4) for part in ("mlp", "norm")}
    save_file(tensors | further, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    assert source.tensors.keys() == whole.tensors.keys()
    assert (whole.num_left_out, source.num_left_out) == (0, 2)
