"""Faults for tests: machines that can be killed, cut off and slowed down, on one host."""
