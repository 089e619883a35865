"""`trimtab doctor PATH`.

`examine.py` finds out what lies there, `ours.py` and `hub.py` examine it, `findings.py` holds what is wrong.
"""
