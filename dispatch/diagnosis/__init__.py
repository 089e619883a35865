"""What a rank tells of itself while it works, so that a hang can be explained and time and bytes accounted for.

Begin with `activity_tracker`: it starts every collective of a step and remembers the phase and the collectives in
flight. `activity` is a snapshot of that as plain values for another process, which `cluster.failures` compares between
ranks. `collective_errors` are the errors that name the ranks that are missing. `meter` adds up seconds by phase, rows
and bytes.
"""
