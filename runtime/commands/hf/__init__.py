"""`trimtab import` and `trimtab export`: models of Hugging Face in and out.

`import_command` and `export_command` are the command lines, `import_model` and `export_model` do the work.
"""
