"""The memory of a step, which the next one needs again: what depends on the C library is here."""

import ctypes
import platform

# What glibc's malloc.h calls M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX and M_ARENA_MAX: how much free memory at the end
# of the heap is too much (no amount), by how many bytes the heap grows at least, how many blocks may lie outside of it,
# and how many heaps there are. Those that glibc makes for further threads have no room for a block of 64 MB: it would
# lie outside whatever the other settings are, and `fit` runs a step of TensorFlow in such a thread.
SETTINGS = {-1: -1, -2: 64 * 2**20, -4: 0, -8: 1}


def keep_memory():
    """Lets this process keep the memory that a step on a CPU frees, for the next one. Call it at the start of a script.

    A step of training takes hundreds of megabytes for what it computes, and frees them. glibc's allocator gives blocks
    of that size back to the system at once, which has to clear each of their pages when the next step takes it: for a
    small encoder on TensorFlow that is a quarter of a step's time. Here they stay with the process, whose size falls no
    more below the most that it ever took. All threads share one heap for that; those that have one of their own
    already, because they allocated something before, stay with it.

    It matters for generation as well. On a GPU, whose memory every backend keeps by itself, it does no harm. Variables
    such as `MALLOC_TRIM_THRESHOLD_` in the environment, or another allocator, are other ways to the same end.

    Returns:
        boolean. Whether the C library could be told: glibc, which most distributions of Linux have.

    Reference: [The GNU C Library](https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html),
    tunable parameters of malloc.

    Example:

    >>> import platform, keras_transformer as kt
    >>> kt.training.keep_memory() == (platform.libc_ver()[0] == "glibc")
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    tell = ctypes.CDLL(None).mallopt
    return all([tell(parameter, value) == 1 for parameter, value in SETTINGS.items()])
