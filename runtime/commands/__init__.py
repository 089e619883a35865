"""The subcommands of `trimtab`, one file or folder each.

Begin with `command`: a subcommand is a module with HELP, add_arguments and run; where it is a folder, that module is
its `command`. `runtime/cli.py` lists them. Files here: `train`, `eval`, `generate` and `report` work on a run, `runs`
lists runs, `stop` ends one, `watch` serves the live page. They share `options`, `inference` (what evaluation and
generation start), `out` (the folder that a command writes to), `results` (what it writes there) and `completion` (what
Tab offers). Folders: `cluster` starts and ends Ray, `submit` sends a command to it, `doctor` examines it, `chaos`
breaks it; `plan` computes memory and time beforehand, `bench` measures, `compare` trains and `replay` recomputes ways
of balancing; `hf` imports and exports models.
"""
