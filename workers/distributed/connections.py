"""The TCP connections of gloo's groups: refuses those of strangers, and breaks all of them at once.

gloo lets any process that connects take the place of a rank: all that it asks for is a small number. So the ranks
compare the connections that each of them holds.

gloo closes a group only when none of its operations is in flight. After the death of a rank that may take long: the
survivors wait for each other, each in another group, until their time-outs. Shutting a connection down ends the waits
at both of its ends, in milliseconds. (torch's ProcessGroup.abort does nothing on gloo, as of 2.13.)
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dispatch.errors import UserError
from dispatch.values import all_gather_values

Address = tuple[str, int]


class StrangerConnected(UserError, RuntimeError):
    """A process that is no rank of the gang has a connection to one of its groups."""


@dataclass(frozen=True)
class Connections:
    """The connections of some gloo groups. listeners: addresses at which the ranks of the groups accept them.

    On CUDA, NCCL's may be among them. Aborting these does no harm: no process of a gang that failed on CUDA is kept.
    """

    listeners: frozenset[Address] = frozenset()

    @classmethod
    def formed_since(cls, before: frozenset[Address], group: dist.ProcessGroup) -> Self:
        """The connections of the gloo groups formed since an earlier call of `listening()`, which returned `before`.

        Nothing else in this process may have begun to listen meanwhile. Collective over `group`, which must be gloo.
        """
        own_listeners = sorted(listening() - before)
        return cls(frozenset(chain.from_iterable(all_gather_values(own_listeners, group, _read_addresses))))

    def abort(self) -> None:
        """Shut these connections down, from any thread: operations on them raise RuntimeError, on other ranks too."""
        for each in psutil.Process().net_connections("tcp"):
            # A connection has the address of a listener at the end that accepted it, here or on the other rank.
            if each.status == psutil.CONN_ESTABLISHED and not self.listeners.isdisjoint({each.laddr, each.raddr}):
                # OSError: the connection was closed meanwhile, at either end. `socket` closes the descriptor that it is
                # given: it gets a duplicate, as closing gloo's own would free its number for another file while gloo
                # still uses it.
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as end:
                    end.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def aborted_on_error(self) -> Iterator[None]:
        """Context for work that all ranks do together: if it fails here, the others fail at once instead of waiting."""
        try:
            yield
        except Exception:
            self.abort()
            raise


def refuse_strangers(before: frozenset[Address], store: Store, rank: int, world_size: int) -> None:
    """Check that every connection to the gloo groups comes from a rank of the gang.

    The ranks compare their connections through `store`: in a group, a stranger could send false answers. Call it before
    any use of the groups: a stranger could make the first use fail or hang, and nobody would know why.

    Args:
        before: what `listening()` returned before the groups were formed.

    Raises:
        StrangerConnected: on all ranks.

    Collective. It cannot tell a connection that took a rank's place from one that is merely open.
    """
    listeners = listening() - before
    connections = psutil.Process().net_connections("tcp")
    # Connections that are no longer established count too: a stranger may have sent something before it closed its end.
    ends = [(each.laddr, each.raddr) for each in connections if each.status != psutil.CONN_LISTEN]
    accepted = [end for end in ends if end[0] in listeners]
    made = [local for local, _ in ends if local not in listeners]
    store.set(f"connections/{rank}", json.dumps([accepted, made]))
    by_rank = [json.loads(store.get(f"connections/{each}")) for each in range(world_size)]
    made_by_ranks = {tuple(local) for _, made in by_rank for local in made}
    for acceptor, (accepted, _) in enumerate(by_rank):
        for (ip, port), stranger in accepted:
            if tuple(stranger) not in made_by_ranks:
                raise StrangerConnected(
                    f"{stranger[0]} port {stranger[1]} is connected to rank {acceptor} at {ip} port {port}, where only"
                    " ranks of this gang may be; a stranger could send false tensors, so the gang does not start. Find"
                    " that process (ss -tnp), keep it from the ports of this machine, and start again"
                )


def _read_addresses(value: Any) -> list[Address]:
    if any((type(ip), type(port)) != (str, int) for ip, port in value):
        raise TypeError("pairs of address and port are expected")
    return [(ip, port) for ip, port in value]


def listening() -> frozenset[Address]:
    """Addresses at which this process accepts TCP connections."""
    found = psutil.Process().net_connections("tcp")
    return frozenset((each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN)
