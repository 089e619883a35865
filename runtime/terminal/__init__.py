"""The person at the terminal: what is said to them, and what their signals mean.

`say` prints a line as it is, `progress_line` tells what is done now, `tables` and `quantities` word tables and numbers,
and `new_text` shows text as it is generated. `failure` has the words for an exception, `interrupt` is Ctrl-C and other
signals, and `lasting_output` is output that a command outlives.
"""
