"""What a rank computes with the rows that have arrived: its experts.

Begin with `stacked`: it holds the weights of all local experts and picks the path. `looped` is that of CPUs, one expert
after the other, with the activation and its gradients; `grouped` computes all experts at once where the batch is small.
`fused` is that of CUDA, grouped matmuls (`grouped_matmul`) with few kernels around them. `variants` has experts with
biases or a clamped activation. `weight_grads` sums the gradients of the weights in place; `joined_rows` has copies of
other ranks' experts behind a rank's own. `dense` is the feed-forward of all tokens.
"""
