"""The settings of a run.

`config.py` joins the dataclasses and checks the rules between them, `config_file.py` reads YAML files, presets and the
options of `trimtab train`, `train_help.py` writes their help. `pipeline_rules.py` refuses what does not go with
stages of layers. `size.py` counts the parameters of a model, `states.py` the bytes that a rank keeps.
"""
