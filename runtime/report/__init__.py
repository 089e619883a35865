"""A run that has been written, read again.

`run_record.py` reads it, `report.py` prints and writes its report. `report_page.py` is the file's text; `held.py` the
numbers in it, and `page_script.py` the live page's modules, which draw them: `static/` has what a report adds.
`chart_style.py` is the common style of all pictures of Trimtab.
"""
