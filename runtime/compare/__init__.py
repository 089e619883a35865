"""`trimtab compare`: ways of balancing, compared in training."""
