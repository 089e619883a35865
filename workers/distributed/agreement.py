"""Work that all ranks do together: if it fails on one, all of them raise, and the cause is kept."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from dispatch.errors import UserError
from dispatch.values import all_gather_values

T = TypeVar("T")
# An error as it is sent to the other ranks: its class, by name in `kinds`, and the arguments of its constructor. For a
# bug: "" and its text.
_SentError = tuple[str, list[str | None]]


class PeerFailed(RuntimeError):
    """Another rank hit a bug in work that all ranks do together.

    ranks: that rank alone. The error that it raised itself has the traceback.
    """

    def __init__(self, doing: str, rank: int, text: str) -> None:
        super().__init__(doing, rank, text)
        self.doing, self.ranks, self.text = doing, (rank,), text

    def __str__(self) -> str:
        return f"{self.doing} failed on rank {self.ranks[0]}: {self.text}"


def together(
    group: dist.ProcessGroup | None,
    doing: str,
    work: Callable[[], T],
    *,
    kinds: Mapping[str, type[UserError]],
    explain: Callable[[Exception], UserError | None],
) -> T:
    """Run local `work` and return its result; if it fails on any rank, raise on all ranks.

    Args:
        doing: what the work is, for the error.
        kinds: the errors that are sent to other ranks, by name. There each is made anew from its `args`, which must be
            texts, paths or None.
        explain: turns what `work` raised into an error of one of `kinds`, for the user; None where it is a bug.

    Raises:
        UserError: of one of `kinds`, the same on all ranks. On the rank where it arose it has its cause.
        Exception: on a rank that hit a bug, the error as it was raised; PeerFailed on the others.

    Collective over `group`; `work` must not be.
    """
    failure: Exception | None = None
    sent: _SentError | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        failure, sent = _explained(error, explain, kinds)
    errors = all_gather_values(sent, group, _read_error)
    failed = [(*error, rank) for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return result
    # Bugs come first: they would still be there after the user has mended the other errors.
    kind, args, rank = min(failed, key=lambda entry: (entry[0] in kinds, entry[2]))
    if failure is not None and rank == (0 if group is None else dist.get_rank(group)):
        raise failure
    raise (kinds[kind](*args) if kind in kinds else PeerFailed(doing, rank, str(args[0]))) from failure


def _explained(
    error: Exception, explain: Callable[[Exception], UserError | None], kinds: Mapping[str, type[UserError]]
) -> tuple[Exception, _SentError]:
    explained = explain(error)
    if explained is None or type(explained).__name__ not in kinds:
        return error, ("", [f"{type(error).__name__}: {error}"])
    if explained is not error:
        explained.__cause__ = error
    return explained, (type(explained).__name__, [None if arg is None else str(arg) for arg in explained.args])


def _read_error(value: Any) -> _SentError | None:
    if value is None:
        return None
    kind, args = value
    if type(kind) is not str or not args or not all(arg is None or type(arg) is str for arg in args):
        raise TypeError("the name of an error and its arguments are expected")
    return kind, args
