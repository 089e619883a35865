"""The person at the terminal.

Here are lines, numbers and tables as people read them, Ctrl-C and other signals (`interrupt.py`), and the words for an
exception (`failure.py`).
"""
