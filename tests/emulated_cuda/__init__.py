"""A CUDA device that CPU memory stands for: what the code for CUDA does, on a machine without one.

`tensor` has tensors that say they lie on cuda:0 and hold their values in a CPU tensor, `device` has what else torch has
of a device, and `library` the few lines of C++ that let torch's CPU build run autograd on them. An operation that mixes
devices raises, as on CUDA. One at which the host waits for the device is counted by the function that caused it. A copy
to the host that does not wait arrives when something waits; until then the host reads NaN. Triton's interpreter runs
the kernels, and ranks exchange by gloo.

What it does not show: time, memory, NCCL, kernels as they are compiled, and two streams that touch one tensor.
"""
