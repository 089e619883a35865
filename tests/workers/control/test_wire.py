"""The wire: what is written is read back bit for bit, and everything else is refused."""

import struct
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dispatch.balance import bias_checksum
from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from workers.control.wire import (
    PROTOCOL_VERSION,
    BiasUpdate,
    LoadReport,
    NeedState,
    Refusal,
    Seed,
    VersionedState,
    WireError,
    decode,
    encode,
    law_checksum,
    max_message_bytes,
    sealed,
)

LAYOUT = LoadLayout(names=("layers.1.moe.router", "layers.2.moe.router"), num_experts=(2, 3), balanced=(True, False))
STATE = LawState(
    torch.tensor([0.25, -0.25, 0.0, 1e-30, -3.0]), {"momentum": torch.arange(5.0), "steps": torch.tensor([7])}
)


def _report(**changes: Any) -> LoadReport:
    seed = Seed(config=BalanceConfig(law="sign", rate=0.1), layout=LAYOUT, state=STATE)
    fields = {"run_id": "r", "step": 3, "base_version": 2, "base_checksum": 11, "law_checksum": 12, "seed": seed}
    return LoadReport(**{"counts_M": torch.tensor([1, 2, 3, 4, 2**40]), **fields, **changes})


def _bend(message: Any, **changes: Any) -> bytes:
    """The message with fields replaced; a change to `...` removes one."""
    fields = msgpack.unpackb(encode(message)[4:]) | changes
    return _sealed({name: value for name, value in fields.items() if value is not ...})


def _sealed(value: Any) -> bytes:
    return sealed(msgpack.packb(value))


def test_a_report_comes_back_bit_for_bit() -> None:
    read = decode(encode(_report()))
    assert isinstance(read, LoadReport) and read.seed is not None
    assert read.counts_M.dtype == torch.int64 and read.counts_M.tolist() == [1, 2, 3, 4, 2**40]
    assert (read.run_id, read.step, read.base_version, read.base_checksum, read.law_checksum) == ("r", 3, 2, 11, 12)
    assert read.seed.config == BalanceConfig(law="sign", rate=0.1) and read.seed.layout == LAYOUT
    assert read.seed.state.bias_N.equal(STATE.bias_N)
    extras = {name: (value.dtype, value.tolist()) for name, value in read.seed.state.extras.items()}
    assert extras == {name: (value.dtype, value.tolist()) for name, value in STATE.extras.items()}
    assert encode(read) == encode(_report())
    assert decode(encode(_report(seed=None))).seed is None  # type: ignore[union-attr]


def test_a_model_without_moe_layers_has_messages_too() -> None:
    nothing = LawState(torch.zeros(0))
    assert decode(encode(_report(counts_M=torch.zeros(0, dtype=torch.int64), seed=None))).counts_M.shape == (0,)  # type: ignore[union-attr]
    assert decode(encode(BiasUpdate(step=0, version=1, state=nothing))).state.bias_N.shape == (0,)  # type: ignore[union-attr]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40), st.integers(0, 2**63 - 1))
def test_an_update_comes_back_bit_for_bit(bias: list[float], number: int) -> None:
    bias_N = torch.tensor(bias, dtype=torch.float32)
    read = decode(encode(BiasUpdate(step=number, version=number, state=LawState(bias_N))))
    assert isinstance(read, BiasUpdate) and (read.step, read.version) == (number, number)
    assert bias_checksum(read.state.bias_N) == bias_checksum(bias_N)  # -0.0 stays -0.0


def test_short_messages_come_back() -> None:
    assert decode(encode(NeedState(step=4))) == NeedState(step=4)
    assert decode(encode(Refusal(reason="x"))) == Refusal(reason="x")
    assert len(encode(Refusal(reason="x" * 10**6))) < 1000  # it must fit into the mail between ranks


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "checksum"),
        (encode(_report()) + b"\x00", "checksum"),
        (encode(_report())[:-1], "checksum"),
        (["no", "bytes"], "a list is no message"),
        (sealed(b""), "not a msgpack message"),
        (sealed(b"\xc1"), "not a msgpack message"),
        (sealed(b"\x80\x04K\x01."), "not a msgpack message"),  # a pickle
        (_sealed([1]), "protocol"),
        (_sealed({"protocol": PROTOCOL_VERSION, "kind": "Hello"}), "unknown kind of message 'Hello'"),
        (_sealed({"protocol": PROTOCOL_VERSION, "kind": ["x"]}), "unknown kind"),
        (_sealed({"protocol": PROTOCOL_VERSION, "kind": "K" * 1000}), "unknown kind of message 'K{59}$"),
        (_sealed(msgpack.ExtType(3, b"x")), "not a msgpack message"),
        (_bend(_report(), protocol=1), "one version of trimtab"),
        (_bend(_report(), extra=1), "fields are"),
        (_bend(_report(), step=...), "fields are"),
        (_bend(_report(), step=True), "step is of type bool"),
        (_bend(_report(), step=-1), "out of range"),
        (_bend(_report(), base_version=2**63), "out of range"),
        (_bend(_report(), run_id=b"r"), "run_id is of type bytes"),
        (_bend(_report(), counts=b"\x00" * 7), "no counts"),
        (_bend(_report(), counts=struct.pack("<q", -1)), "negative"),
        (_bend(_report(), seed={"config": {}}), "fields are"),
        (_bend(_report(), seed={"config": {"law": "x"}, "layout": {}, "state": {}}), "balance.law"),
        (_bend(_report(), seed={"config": {"rat": 1}, "layout": {}, "state": {}}), "rat"),
        (_bend(_report(), seed={"config": {"rate": "1"}, "layout": {}, "state": {}}), "LoadReport"),
        (_bend(BiasUpdate(step=1, version=2, state=STATE), state={"bias": ["<f8", b""], "extras": {}}), "dtype"),
        (_bend(BiasUpdate(step=1, version=2, state=STATE), state={"bias": ["<f4"], "extras": {}}), "BiasUpdate"),
        (_bend(BiasUpdate(step=1, version=2, state=STATE), state={"bias": 3, "extras": {}}), "bias is of type int"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_protocol_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode(raw)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(WireError, match="bias is not finite"):
        decode(encode(BiasUpdate(step=1, version=2, state=LawState(torch.tensor([0.0, bad])))))


def test_a_layout_of_the_wrong_types_is_refused() -> None:
    fields = msgpack.unpackb(encode(_report())[4:])
    for name, value in (
        ("num_experts", [2, 2.5]),
        ("num_experts", [2, 0]),
        ("balanced", [1, 0]),
        ("names", ["one", 2]),
    ):
        seed = fields["seed"] | {"layout": fields["seed"]["layout"] | {name: value}}
        with pytest.raises(WireError, match=name):
            decode(_sealed(fields | {"seed": seed}))


@given(st.integers(0, len(encode(_report())) - 1), st.integers(1, 255))
def test_a_damaged_report_is_refused(at: int, flip: int) -> None:
    raw = bytearray(encode(_report()))
    raw[at] ^= flip
    with pytest.raises(WireError, match="checksum"):
        decode(bytes(raw))


def test_a_message_larger_than_its_experts_allow_is_refused_unread() -> None:
    with pytest.raises(WireError, match="at most"):
        decode(b"\x00" * 1001, max_bytes=1000)
    assert len(encode(_report())) < max_message_bytes(Law(BalanceConfig(law="sign", rate=0.1), LAYOUT))


def test_the_checksum_of_a_state_covers_bias_and_extras_and_is_the_bias_checksum_without_them() -> None:
    plain = LawState(STATE.bias_N)
    assert VersionedState(1, plain).checksum == bias_checksum(STATE.bias_N)
    other = LawState(STATE.bias_N, {**STATE.extras, "momentum": torch.arange(5.0) + 1})
    assert len({VersionedState(1, state).checksum for state in (plain, STATE, other)}) == 3


def test_the_checksum_of_a_law_tells_its_rate_and_its_layers() -> None:
    base = law_checksum(BalanceConfig(law="sign", rate=0.1), LAYOUT)
    assert law_checksum(BalanceConfig(law="sign", rate=0.1), LAYOUT) == base
    assert law_checksum(BalanceConfig(law="sign", rate=0.2), LAYOUT) != base
    assert law_checksum(BalanceConfig(law="sign", rate=0.1), LoadLayout(LAYOUT.names, (3, 2), LAYOUT.balanced)) != base
