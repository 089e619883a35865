"""A run that has been written, read again.

`run_record.py` reads it, `report.py` prints and writes its report, `charts.py` draws. `chart_style.py` is the common
style of all pictures of Trimtab.
"""
