"""How ranks find each other and become process groups.

Begin with `parallel`: the layout of the ranks (edp × ep) and the groups that they communicate in. torch's store for
that is `gang_store`; it works through Ray calls to the `mailbox` of each rank. `connections` refuses strangers at
gloo's sockets, and breaks all connections when a rank fails. `exchange_choice` resolves the exchange "auto" from which
ranks share a node. `agreement` makes all ranks raise when one fails, and `collateral` recognises errors that only say
that another rank is gone. `sharded` gives the rows of a sharded tensor that this rank holds; `replicas` forms the
groups that each hold all sharded states once. `pipeline` divides layers and ranks into stages; `context` is the place
of a rank among those that share its sequences. `heap` gives freed memory of CPU ranks back to the system; `memory`
tells how much memory a rank holds.
"""
