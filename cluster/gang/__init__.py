"""The gang: one actor a rank, placed, joined, and formed again after a failure.

Begin with `supervisor.Supervisor.run`, which keeps a run going: it trains on a `gang.Gang`, asks `policy.decide` what a
failure means, and forms the gang again or at another size. `placement` decides which rank each actor becomes,
`capacity` how many workers the cluster can hold and asks for more. `preflight` checks memory and disk before a start.
"""
