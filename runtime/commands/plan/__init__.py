"""`trimtab plan`: memory of each rank and bytes on the network before anything starts.

`subject` reads what is planned, `activations` and `traffic` compute, `stages` takes a pipeline apart, `plan` adds up,
`fit` looks for the cheapest settings with which a rank fits into its device, and `table` prints. `simulate` adds how
long a step takes. `command` is the command line.
"""
