"""Text from a trained model, by the same routing and exchange as in training.

Begin with `generate.generate`, which all ranks call together. `decoding` keeps the sequences that a rank continues and
builds the inputs of each forward from them. `expert_trace` records which experts take each token; `pieces` divides the
generated text among its tokens.
"""
