"""`trimtab bench coordinator`: the control path measured, and a model of it for more ranks than this machine has.

`benchmark` runs the measurements: each is a `case`, on `ranks` whose leader reports one made-up `load` after another,
and gives a `measurement`. `model` predicts other sizes from them; `table` and `chart` show both; `command` is the
command line.
"""
