"""`trimtab cluster`: make machines a Ray cluster, look at it, end it, and write files that others start it from."""
