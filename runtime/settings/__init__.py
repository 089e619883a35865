"""The settings of a run.

`config` joins the dataclasses and checks the rules between them; `pipeline_rules` refuses what does not go with stages
of layers. `config_file` reads YAML files (by `yaml_text`, which trusts none), presets and the options of `trimtab
train`, and `train_help` writes their help. `consent` refuses to import a module that only a run directory names, and
`cautions` warns of what is allowed and rarely meant. `size` counts the parameters of a model, `states` the bytes that a
rank keeps.
"""
