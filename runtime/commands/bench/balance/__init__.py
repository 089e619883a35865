"""`trimtab bench balance`: the laws on simulated routers and on recorded runs, against the published one, tuned."""
