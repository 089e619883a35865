"""`trimtab submit`: a command as a Ray job on a cluster, with the code of this folder (`jobs.py`)."""
