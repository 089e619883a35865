"""How rows travel between the ranks of an expert-parallel group, and back. Read it in this order.

1. `dispatcher`: the protocol that a layer calls, with its handles. `registry` has the dispatchers by name, `factory`
   builds one.
2. `all_to_all`: the usual dispatcher, in plain torch. `exchange_group` computes which token goes to which rank (and
   `assignment_group` which assignment), `token_exchange` carries the rows, in two halves with their gradients.
3. `row_map` copies and sums rows inside a rank; `payload` codes rows as fp8; `buffer_pool` reuses memory; `placement`
   says which rank has which expert, `expert_copies` which ranks have copies of hot ones, and `physical_experts` which
   copy computes which assignment.
4. The other dispatchers: `local` for one rank, `node_aware` for two exchanges in a row (over `node_groups`), `deep_ep`
   for DeepEP's kernels.
"""
