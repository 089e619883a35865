"""What the C library keeps of memory that was freed, on CPU ranks."""

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)

LARGE_BYTES = 1 << 20


def give_back_large_blocks() -> bool:
    """Let blocks of a mebibyte and more go back to the system when they are freed, from now on in this process.

    glibc gives back at once what is larger than the largest block freed so far, up to 32 MiB; what is smaller lies in
    its heap, where a small block that stays keeps the free ones below it. Sharded states gather and free weights and
    gradients of all sizes, block by block: the heap then keeps up to half as much again as is in use.

    Returns whether the C library took it: others than glibc, which have no such heap, need not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
