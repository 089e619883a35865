"""`trimtab doctor cluster`.

`examine.py` asks every node and rank, `judge.py` says what is wrong, `table.py` shows it.
"""
