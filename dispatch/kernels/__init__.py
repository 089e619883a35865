"""Triton kernels for CUDA, each a plain function on tensors.

`availability` says where they run; `rows` copies and sums rows, `swiglu` is the activation, `few_rows` the matmul of a
few rows. `tiles` has the tile sizes that they share. All but `availability` import Triton, which comes with torch's
CUDA builds and not with its CPU builds: import them only where `use_triton` holds.

Rules that they share. Offsets of rows are int64: rows times width passes 2**31. Sizes that change with every batch are
not specialized and nothing is tuned by them: a training step would have to compile. Widths are constants, so that the
compiler knows how rows are aligned. A thread moves 16 bytes at once, which takes tiles of at least 512 bytes a warp.
Rows lie on the first axis of the grid: the second ends at 65,535. An empty grid is an error: for no rows, no launch.
"""
