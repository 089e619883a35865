"""A model that reads a sequence piece by piece from its cache computes what it computes of the whole."""

import pytest
import torch

from tests.workers.model.test_decoder import build, tokens
from workers.model.attention import KeyValueCache, LatentConfig
from workers.model.decoder import Decoder

LATENT = LatentConfig(query_rank=8, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=5)
KINDS = {
    "grouped_query": {"query_key_norm": "head", "clip_qkv": 1.0},
    "latent": {"attention": "latent", "latent": LATENT},
}


def _model(kind: str) -> Decoder:
    return build(**KINDS[kind]).eval()


@torch.no_grad()
def _piecewise(model: Decoder, token_ids: torch.Tensor, bounds: list[int], cache: KeyValueCache) -> torch.Tensor:
    """Logits of tokens that are read in the pieces between these bounds; the first piece counts from 0 by itself."""
    pieces = []
    for start, end in zip([0, *bounds], [*bounds, token_ids.shape[1]], strict=True):
        positions = torch.arange(start, end).expand(len(token_ids), -1)
        piece = {"positions": positions} if start else {}
        pieces.append(model(token_ids[:, start:end], cache=cache, **piece))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [[1, 2, 3, 4, 5, 6], [4, 5], [3], [2, 6]])
def test_pieces_give_the_logits_of_the_whole(kind: str, bounds: list[int]) -> None:
    model, token_ids = _model(kind).double(), tokens()
    actual = _piecewise(model, token_ids, bounds, KeyValueCache(16))
    torch.testing.assert_close(actual, model(token_ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_places_beyond_the_last_token_change_nothing(kind: str) -> None:
    model, token_ids = _model(kind).double(), tokens()
    assert token_ids.shape[1] == 7  # read with 4, 4, 7 and 7 places
    widths = []
    cache = KeyValueCache(7, width_step=4)
    update = cache.update
    cache.update = lambda layer, *new: widths.append((kept := update(layer, *new))[0].shape[1]) or kept
    actual = _piecewise(model, token_ids, [3, 4, 5], cache)
    torch.testing.assert_close(actual, model(token_ids), rtol=1e-12, atol=1e-12)
    assert set(widths) == {4, 7}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_bfloat16_stay_close_to_the_whole(kind: str) -> None:
    model, token_ids = _model(kind), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        actual = _piecewise(model, token_ids, [4, 5, 6], KeyValueCache(16))
        torch.testing.assert_close(actual, model(token_ids), rtol=0.05, atol=0.05)


def test_a_place_costs_what_the_kind_of_attention_needs() -> None:
    expected = {"grouped_query": 2 * 2 * 4, "latent": 6 + 2}  # keys and values of 2 heads of 4; kv_rank and rope_dim
    for kind, width in expected.items():
        cache = KeyValueCache(9)
        _piecewise(_model(kind), tokens(batch=5), [], cache)
        assert cache.num_bytes == 3 * 5 * 9 * width * 4  # layers, sequences, places, fp32


def test_padding_is_overwritten_and_rows_can_leave() -> None:
    # a b c .      a and b go on with their own next tokens, at places 3 and 1; the middle row leaves.
    # d e f g
    # h . . .
    model, token_ids = _model("grouped_query").double(), tokens(batch=3)
    lengths, cache = torch.tensor([3, 4, 1]), KeyValueCache(8)
    mask = torch.arange(4) < lengths.unsqueeze(1)
    with torch.no_grad():
        model(token_ids[:, :4], token_mask=mask, cache=cache)
        cache.keep_rows([0, 2])
        actual = model(
            torch.stack([token_ids[0, 3:4], token_ids[2, 1:2]]), positions=lengths[[0, 2], None], cache=cache
        )
        for row, (index, length) in enumerate([(0, 4), (2, 2)]):
            whole = model(token_ids[index : index + 1, :length])
            torch.testing.assert_close(actual[row, 0], whole[0, -1], rtol=1e-12, atol=1e-12)


def test_only_the_wanted_logits_are_computed() -> None:
    model, token_ids = _model("latent"), tokens()
    wanted = model(token_ids, logits_at=torch.tensor([2, 6]))
    assert torch.equal(wanted, model(token_ids)[[0, 1], [2, 6]])


def test_a_position_beyond_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="position 6 is beyond the 6 slots of the cache"):
        _piecewise(_model("latent"), tokens(), [], KeyValueCache(6))
