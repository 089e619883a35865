"""The language model: a decoder of attention and MoE blocks, its initial weights, and its frozen parts.

Begin with `model_config`, its sizes, and `decoder`. `loss` has the cross entropy; `attention` has one file a kind of
attention. `families` maps models of Hugging Face to this decoder and back. `init` draws weights that do not depend on
the number of ranks; `meta_device` builds a model without weights; `freezing` turns gradients off for named parts;
`lora` has adapters that train in place of the model; `flops` counts the operations of training.
"""
