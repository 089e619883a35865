"""`trimtab bench coordinator`: the control path measured, and a model of it for more ranks than this machine has."""
