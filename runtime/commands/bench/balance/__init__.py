"""`trimtab bench balance`: the laws on simulated routers and on recorded runs, against the published one, tuned.

`benchmark` simulates the laws, `verdict` compares the best with the tuned sign law, `command` is the command line.
"""
