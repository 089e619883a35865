"""`trimtab doctor`: examines what a run depends on. `checkpoint` for its files, `cluster` for nodes and network."""
