"""`trimtab chaos`: faults against a real training run.

`machines.py` makes machines of network namespaces, `plan.py` draws the faults, `injections.py` carries them out,
`campaign.py` plays the plan and compares the run with an undisturbed one.
"""
