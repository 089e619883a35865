"""`trimtab doctor cluster`: finds what would go wrong on the nodes, links and ranks of a run to come.

`diagnosis` runs the command. `examine` looks: by a `probe` on every node (`probes` sends them), at the `links`
between all `pairs` of nodes, and at `ranks` that join as in training. `survey` is what was found, as plain values;
`judge` says what of it is wrong, and `table` shows it. `command` is the command line.
"""
