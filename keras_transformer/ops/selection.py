"""The largest of many numbers without sorting all of them, which is what XLA does on a CPU."""

import math

from keras import ops

from keras_transformer.ops.looping import compiled_by_xla_for_cpu

LONG = 1024


def top_k(x, k):
    """What `ops.top_k(x, k)` gives: of equal numbers the first ones. `k` is small beside the last axis.

    The `k` largest are in those `k` parts of a row whose own largest numbers are the largest. Only these and the
    numbers of the parts are sorted.

    Args:
        x: float tensor of shape `[B, N]`, N known.
        k: int.

    Returns:
        Tuple of values and `int32` places, each `[B, k]`, in descending order of values.
    """
    size = x.shape[-1]
    width = max(1, math.isqrt(size // k))
    count = -(-size // width)
    if size < LONG or count <= k or not compiled_by_xla_for_cpu():
        values, places = ops.top_k(x, k)
        return values, ops.cast(places, "int32")
    rows = ops.shape(x)[0]
    parts = ops.pad(x, ((0, 0), (0, count * width - size)), constant_values=-math.inf)
    parts = ops.reshape(parts, (rows, count, width))
    _, chosen = ops.top_k(ops.max(parts, axis=-1), k)
    # In the order of their places again, so that the first of equal numbers is found first.
    chosen = ops.sort(ops.cast(chosen, "int32"), axis=-1)  # [B, k]
    numbers = ops.take_along_axis(parts, ops.expand_dims(chosen, -1), axis=1)  # [B, k, width]
    values, within = ops.top_k(ops.reshape(numbers, (rows, k * width)), k)
    within = ops.cast(within, "int32")
    return values, ops.take_along_axis(chosen, within // width, axis=1) * width + within % width


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
