"""An exchange of one's own, by one function and one registration. See docs/how-to-add.md."""

from dispatch.errors import InvalidValue
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.registry import BackendContext, ExchangeShape, one_row_a_rank, register_backend


def only_whole_rows(shape: ExchangeShape) -> None:
    """Refuse, before a process starts, what the exchange cannot carry."""
    if shape.payload != "compute":
        raise InvalidValue(f"payload {shape.payload!r} is not for exchange 'plain'; take 'compute'")


@register_backend("plain", hops=one_row_a_rank, check=only_whole_rows, automatic=False)
def plain(context: BackendContext) -> Dispatcher:
    """A row for each rank by torch's all-to-all; a dispatcher of your own has the methods of `Dispatcher`."""
    return AllToAllDispatcher(context.shape.num_experts, context.ep_group, meter=context.meter)
