"""`trimtab replay`: laws on recorded or simulated scores, without training."""
