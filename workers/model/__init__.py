"""The language model: a decoder of attention and MoE blocks, its initial weights, and its frozen parts.

Begin with `decoder`, whose blocks are recomputed in backward (activation checkpointing) where `model_config.Recompute`
says so; `model_config` has all its settings. `loss` is the cross entropy; `attention` has one file for each kind of
attention. `families` maps models of Hugging Face to this decoder and back, and `hugging_face` reads and writes their
files. `init` draws weights that do not depend on the number of ranks; `meta_device` builds a model without weights;
`freezing` turns gradients off for named parts; `lora` has adapters that train instead of the base weights; `flops`
counts the operations of training.
"""
