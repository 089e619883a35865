"""`trimtab import` and `trimtab export`: models of Hugging Face in and out."""
