"""Detects failures: which rank failed first, and which rank holds up the others.

Nothing here recovers from a failure: `cluster.gang.supervisor` does.

Begin with `calls.call_all`, which waits for one call on every rank. If the gang fails, it raises `errors.GangFailed`,
which lists the failures of all ranks, the cause first. `activity_watch` asks the ranks for their activity while they
work. `stall` compares the answers and names the ranks to blame for a hang; `stacks` fetches the stacks of those.
`member` is a rank as the driver knows it; `kill` ends a process that does not answer.
"""
