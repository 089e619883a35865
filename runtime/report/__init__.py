"""A run that has been written, read again.

`run_record` reads it, and `report` prints its summary and writes report.html. `report_page` is that file's text, `held`
the numbers in it, and `page_script` the live page's modules, which draw them; `static/` has what a report adds.
`chart_style` is the common style of all pictures of Trimtab.
"""
