"""Measurements of Trimtab on the machine at hand: `trimtab bench`."""
