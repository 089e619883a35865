"""The subcommands of `trimtab`, one file or folder each.

`command.py` says what a subcommand is: a module with HELP, add_arguments and run; in a folder that is its
`command.py`. `options.py` has the options that several share, `completion.py` what Tab offers. `runtime/cli.py` lists
the subcommands.
"""
