"""What a rank records about itself while it works, to explain a hang and to account for time and bytes.

Begin with `activity_tracker`: it starts every collective of a step and remembers the phase and the collectives in
flight. `activity` is a snapshot of these as plain values for another process; `cluster.failures` compares them between
all ranks. `collective_errors` has the errors that name missing ranks. `meter` adds up seconds by phase, rows and bytes.
"""
