"""Which run: find it or name it, own it while it is written, and what it keeps of its text."""
