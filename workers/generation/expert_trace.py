"""Which experts took each token that generation has read.

Shapes: B sequences of a forward, S tokens of the longest one, K top-k. A router sees B * S rows, with padding at the
end of each sequence.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor

from dispatch.routing.router import Router
from workers.generation.decoding import TokenSpan

# By index of the token in its sequence: the ids of its experts, best first.
ExpertsOfTokens = dict[int, list[int]]


class ExpertTrace:
    """A context manager that records the choices of routers by forward hooks. Give its `on_read` to `generate`.

    A text that becomes too long for the model is partly read again: the choices of the first reading are kept.
    """

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = routers
        self._spans: Sequence[TokenSpan] = ()  # of the forward under way
        self._chosen: list[tuple[str, Sequence[TokenSpan], Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name, router in self._routers.items():
            self._stack.callback(router.register_forward_hook(self._make_hook(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_read(self, spans: Sequence[TokenSpan]) -> None:
        """Take the spans that the next forward reads."""
        self._spans = spans

    def by_sequence(self) -> dict[int, dict[str, ExpertsOfTokens]]:
        """The experts of all tokens that were read: by sequence, by router. Waits for the device."""
        experts: dict[int, dict[str, ExpertsOfTokens]] = defaultdict(lambda: defaultdict(dict))
        for name, spans, ids_BSK in self._chosen:
            for span, ids_SK in zip(spans, ids_BSK.tolist(), strict=True):
                for index, ids in enumerate(ids_SK[: span.num_tokens], span.first):
                    experts[span.sequence][name].setdefault(index, ids)
        return experts

    def _make_hook(self, name: str) -> Any:
        def record(_router: Router, _inputs: object, choice: tuple[Tensor, Tensor]) -> None:
            if self._spans:  # none where this rank only computes experts for tokens of other ranks
                self._chosen.append((name, self._spans, choice[0].unflatten(0, (len(self._spans), -1))))

        return record
