"""`trimtab submit`: a command as a Ray job on a cluster, with the code of this folder.

`jobs` packs and sends it, `command` is the command line.
"""
