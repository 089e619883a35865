"""Strategies of bytes for whoever reads the wire: noise, damaged messages, well-formed ones with hostile content."""

import pickle
from typing import Any

import msgpack
import torch
from hypothesis import strategies as st

from dispatch.laws import LAWS, BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from workers.control.wire import MAX_EXPERTS_TOTAL, LoadReport, Seed, VersionedState, encode, law_checksum, sealed

LAYOUT = LoadLayout(names=("a", "b", "c"), num_experts=(4, 2, 3), balanced=(True, True, False))
ONE_EXPERT, NOTHING = LoadLayout(("a",), (1,), (True,)), LoadLayout((), (), ())
MANY = LoadLayout(tuple("abcdefgh"), (MAX_EXPERTS_TOTAL,) * 8, (True,) * 8)  # each layer is allowed, all together not
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.sampled_from([0, 1, -1, 1 << 62, (1 << 63) - 1])
NAMES = st.text(max_size=3) | st.binary(max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip

_EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4)), min_size=1)


def law_of(name: str) -> Law:
    """A law with its defaults, on three layers of which one is not balanced."""
    return Law(BalanceConfig(law=name), LAYOUT)


def counts_of(law: Law, step: int) -> torch.Tensor:
    """Counts of a step as all ranks together would have them: a skewed load, and any statistic."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 50, (law.num_counts,), generator=generator)


def report_of(law: Law, step: int, base: VersionedState, **changes: Any) -> LoadReport:
    """A report on `base`, with a seed."""
    fields = {
        "run_id": "run",
        "step": step,
        "base_version": base.version,
        "base_checksum": base.checksum,
        "law_checksum": law_checksum(law.config, law.layout),
        "counts_M": counts_of(law, step),
        "seed": Seed(config=law.config, layout=law.layout, state=base.state),
    }
    return LoadReport(**{**fields, **changes})


def any_of(*strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Each as likely as the others, however many branches it has; `|` would count the branches."""
    return st.sampled_from(range(len(strategies))).flatmap(lambda number: strategies[number])


def forged(messages: list[bytes]) -> st.SearchStrategy[bytes]:
    """These messages with other bytes and a checksum that fits them: what no accident makes, and no reader can tell."""
    return st.builds(lambda raw, edits: sealed(_mutated(raw[4:], edits)), st.sampled_from(messages), _EDITS)


def damaged(messages: list[bytes]) -> st.SearchStrategy[bytes]:
    """What a broken sender or network could make of these messages, and what has nothing to do with them."""
    one = st.sampled_from(messages)
    return st.one_of(
        one,  # repeated, or out of its order
        st.binary(max_size=200),
        st.builds(_mutated, one, _EDITS),
        st.builds(lambda raw, share: raw[: int(len(raw) * share)], one, st.floats(0, 1, exclude_max=True)),
        st.builds(lambda first, second: first + second, one, one),
        st.builds(_bent, one, st.lists(st.integers(0, 50), min_size=1, max_size=5), VALUES),
        VALUES.map(pickle.dumps),
        VALUES.map(msgpack.packb),
        VALUES.map(lambda value: sealed(msgpack.packb(value))),
        st.sampled_from([b"\x91" * 5000, b"\x81\xa1a" * 5000, b"\xdd\xff\xff\xff\xff", b"\xd4\x05\x01"]),
        one.map(lambda raw: raw + bytes(2 << 20)),
    )  # fmt: skip


def hostile(messages: list[bytes]) -> st.SearchStrategy[bytes]:
    """All of that: what a coordinator must answer, and forget."""
    return any_of(damaged(messages), forged(messages), hostile_reports())


def _mutated(raw: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    """Bytes replaced, the first half of the edits, or inserted."""
    changed = bytearray(raw)
    for number, (place, new) in enumerate(edits):
        at = place % (len(changed) + 1)
        changed[at : at + (len(new) if 2 * number < len(edits) else 0)] = new
    return bytes(changed)


def _bent(raw: bytes, path: list[int], value: Any) -> bytes:
    """The message with one value, found by walking `path` through its fields, replaced by another."""
    message = msgpack.unpackb(raw[4:])
    inner: Any = message
    for number, turn in enumerate(path):
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        if not keys:
            break
        key = keys[turn % len(keys)]
        if number == len(path) - 1 or not isinstance(inner[key], (dict, list)):
            inner[key] = value
            break
        inner = inner[key]
    return sealed(msgpack.packb(message))


@st.composite
def hostile_reports(draw: st.DrawFn) -> bytes:
    """Reports whose checksums are right, and whose law, layers, state or counts no run would have."""
    name = draw(st.sampled_from(sorted(LAWS)))
    size = st.sampled_from([0.0, 0.5, 1e38, 1e300, 1.7e308, 5e-324])
    config = BalanceConfig(
        law=name,
        rate=draw(st.none() | size),
        options={option: draw(size | size.map(lambda x: -x)) for option in LAWS[name].options},
        schedule=draw(st.sampled_from(["constant", "linear", "cosine"])),
        zero_last=draw(st.sampled_from([0.0, 0.1, 1.0, 5e-324])),
        horizon=draw(st.sampled_from([1, 1000, (1 << 64) - 1])),
    )
    layout = draw(st.sampled_from([LAYOUT] * 5 + [ONE_EXPERT, NOTHING, MANY]))
    law = Law(config, layout if layout is not MANY else LAYOUT)
    state = draw(_states(law))
    base = VersionedState(draw(st.sampled_from([0, 1, 2, 3, (1 << 63) - 1])), state)
    length = draw(st.sampled_from([law.num_counts] * 4 + [0, 7]))
    return encode(
        LoadReport(
            run_id=draw(st.sampled_from(["run", "run", "run", "other", ""])),
            step=draw(st.sampled_from([0, 1, 500, (1 << 63) - 1])),
            base_version=base.version,
            base_checksum=base.checksum,
            law_checksum=law_checksum(config, layout),
            counts_M=draw(_counts(length)),
            seed=Seed(config=config, layout=layout, state=state),
        )
    )


@st.composite
def _states(draw: st.DrawFn, law: Law) -> LawState:
    """Of the law's form or nearly, with any values."""
    scale = draw(st.sampled_from([0.0, 1e-45, 1.0, 3e38, float("nan")]))
    length = draw(st.sampled_from([law.layout.total] * 4 + [5]))
    sign = torch.randint(-1, 2, (length,), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    value = draw(st.sampled_from([0.0, -1.0, 3e38, float("nan")]))
    extras = {name: torch.full_like(initial, value) for name, initial in law.initial_state().extras.items()}
    odd = draw(st.sampled_from([None] * 5 + ["", "momentum", "x" * 300]))
    if odd is not None:
        extras[odd] = torch.zeros(law.layout.total)
    return LawState(sign * scale, extras)


def _counts(length: int) -> st.SearchStrategy[torch.Tensor]:
    few = st.lists(st.sampled_from([0, 1, 50, 1 << 31, 1 << 62, (1 << 63) - 1]), min_size=1, max_size=7)
    return few.map(lambda values: torch.tensor((values * (length // len(values) + 1))[:length], dtype=torch.int64))
