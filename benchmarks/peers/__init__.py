"""A race of our MoE layer against the layers of other projects on CPU: `make bench-peers`."""
