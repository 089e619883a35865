"""Experiments with balancing: laws on recorded or simulated scores, and methods compared in training."""
