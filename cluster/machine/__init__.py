"""This machine, without Ray: processes, node folders, the cluster's token, signals, module search path.

`processes` finds and ends processes, which it knows by pid and start time. `node_state` records which nodes
`trimtab cluster` started here. `token` makes and checks the file that grants access to a cluster. `deferred_signals`
holds Ctrl-C back while Ray starts. `search_path` lets Ray's workers import the same packages as the driver.
"""
