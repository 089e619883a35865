"""Makes the C library give freed memory back to the system, on CPU ranks."""

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)

LARGE_BYTES = 1 << 20


def give_back_large_blocks() -> bool:
    """From now on in this process, blocks of a mebibyte and more go back to the system when they are freed.

    glibc by itself raises this bound to the size of the largest block freed so far, up to 32 MiB. Smaller blocks come
    from its heap, and stay with the process while a block above them is in use. Sharded states gather and free weights
    and gradients of all sizes: the heap then keeps up to half as much again as is in use (docs/sharding.md).

    Returns whether the C library knows this setting. Others than glibc do not have it, nor such a heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
