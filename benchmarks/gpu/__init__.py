"""Checks and measures one CUDA device: docs/results/gpu.md and gpu.json.

A module for each section, which measures in a process of its own (`process.py`); `page.py` and `goals.py` show what was
found. `sizes.py` has what is measured: in full, or for a quick look.
"""
