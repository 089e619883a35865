"""`trimtab doctor PATH`: is a checkpoint, of ours or of Hugging Face, whole and what it says?

`examine` finds out what lies there; `ours` and `hub` examine it; `findings` holds what is wrong. `command` is the
command line.
"""
