"""`trimtab doctor`: is everything that a run depends on as it should be?"""
