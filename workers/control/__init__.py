"""The control path: from the global load of a step to the next bias on every rank.

Read `dispatch.balance.LossFreeBalancer` first. Its `step` is the same update in a dozen lines: all-reduce the counts,
apply the law, write the bias. The difference buys three things:

- Overlap. `loop` makes the collectives of a step in a thread, between its last forward and the end of its optimizer
  step, so that neither the sums nor the coordinator's answer hold up backward.
- A coordinator that may die. The law runs in a process of its own (`runtime.job.coordinator`), which may be killed, be
  late or start anew; `leader`, on rank 0, asks it, and computes the same bits while it is away.
- Checks in every step. Ranks that differ in step, law state or live bias would send one token to different experts:
  they stop, or have their bias repaired, and name the odd ranks (`errors`). What rank 0 sends or receives is msgpack
  with a schema, a size limit and a checksum (`wire`).

Begin with `loop.ControlLoop.begin_step` and `finish_step`. docs/architecture.md lists all files that a count passes.
"""
