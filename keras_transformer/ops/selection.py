"""Cutting off the largest of many numbers without sorting all of them, which XLA takes long for on a CPU."""

from keras import ops


def largest_that_covers(x, weights, least):
    """The largest number of each row for which it and all above it weigh at least so much together.

    The numbers' own bits are tried from the highest to the lowest, so that this is exact.

    Args:
        x: `float32` tensor of shape `[B, N]`, without NaN.
        weights: `float32` tensor of shape `[B, N]`, or 1 for all.
        least: float, or a float tensor that broadcasts to `[B, 1]`. Where a whole row weighs less, its lowest number is
            found.

    Returns:
        Tensor of shape `[B, 1]`.
    """
    keys = in_order(ops.view(x, dtype="int32"))
    low, high = (extreme(keys, axis=-1, keepdims=True) for extreme in (ops.min, ops.max))

    def halve(_, ends):
        low, high = ends
        # Half of both, rounded up, whose sum might not fit.
        middle = ops.bitwise_or(low, high) - ops.right_shift(ops.bitwise_xor(low, high), 1)
        weight = ops.sum(ops.where(keys >= middle, weights, 0.0), axis=-1, keepdims=True)
        covers = weight >= least
        return ops.where(covers, middle, low), ops.where(covers, high, middle - 1)

    low, _ = ops.fori_loop(0, 32, halve, (low, high))
    return ops.view(in_order(low), dtype="float32")


def in_order(bits):
    """Bits of `float32` as `int32` numbers in the order of the floats, and back again."""
    return ops.where(bits < 0, ops.bitwise_xor(bits, 0x7FFFFFFF), bits)
