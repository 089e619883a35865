"""Which experts each token goes to, and the count of what was chosen.

Begin with `router.Router`: it scores every expert for each token, chooses the top-k of score + bias, computes the
combine weights from the scores alone, and counts the choices. `selection` has the biased top-k, the limit to groups of
experts and the counting. `statistics` has what a balancing law may count beside the load. `replay` routes
by experts that are given, and records those that were chosen. `precision` keeps the gate and the bias wide.
"""
