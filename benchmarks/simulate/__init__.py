"""Steps that `trimtab plan --simulate` predicts, beside measured ones and beside figures that others publish."""
