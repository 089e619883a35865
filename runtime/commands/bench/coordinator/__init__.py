"""`trimtab bench coordinator`: measures the control path, and models it for more ranks than this machine has.

`benchmark` runs a `case` and returns a `measurement`: first `load` sends reports to the coordinator, one after another,
then `ranks` measures whole rounds between processes. `model` predicts other sizes from them; `table` and `chart` show
both; `command` is the command line.
"""
