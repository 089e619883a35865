"""Which rank failed first, and which rank holds up the others.

Begin with `calls.call_all`, which awaits one call on every rank and raises `errors.GangFailed`, the cause first.
`activity_watch` asks the ranks for their activity while they work; `stall` compares the answers and names the ranks to
blame for a hang; `stacks` fetches their stacks. `member` is a rank as the driver knows it; `kill` ends a process that
does not answer.
"""
