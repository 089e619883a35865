"""`trimtab doctor PATH`: finds damage in a checkpoint of Trimtab or of Hugging Face.

`examine` tells the two apart; `ours` and `hub` examine them; `findings` holds what is wrong. `command` is the
command line.
"""
