"""Reads and writes the files of models of Hugging Face, for every family of `workers.model.families`.

Import, begun by `importing`, which saves the model as a checkpoint: `source` opens and checks the safetensors files,
`filling` copies tensors into a rank's shard, `mxfp4` decodes them on the way. Export: `writing`, of a checkpoint,
`adapters`, of its adapters alone or merged, and `streaming`, of a live model.
"""
