"""`trimtab cluster`: make machines a Ray cluster, look at it, end it, and write files that others start it from.

A file for each: `up`, `join`, `status`, `down`; `manifest` writes the files. They share `node_options`, and
`token_file`, which every machine of a cluster needs.
"""
