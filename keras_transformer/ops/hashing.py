"""Random bits that cost little where XLA compiles for a CPU: a hash of each element's place and of a seed."""

import math

import keras
from keras import ops


def hashed_bits(seed, shape):
    """Bits of `uint32`, a word for each element.

    Args:
        seed: int tensor of shape `[2]`, what a `keras.random.SeedGenerator` gives.
        shape: tuple of ints or int tensors.

    Returns:
        `uint32` tensor of that shape.

    Reference: [lowbias32](https://nullprogram.com/blog/2018/07/31/).
    """
    first, second = (_mixed(ops.cast(word, "uint32")) for word in (seed[0], seed[1]))
    first, second = _mixed(first + second * uint32(0x9E3779B9)), _mixed(second + first * uint32(0x85EBCA6B))
    known = all(isinstance(size, int) for size in shape)
    size = math.prod(shape) if known else ops.prod(ops.stack(shape))
    # XLA has no range of `uint32` for TensorFlow.
    places = ops.arange(size, dtype="int32" if keras.backend.backend() == "tensorflow" else "uint32")
    return _mixed(_mixed(ops.reshape(ops.cast(places, "uint32"), shape) + first) ^ second)


def _mixed(bits):
    """A bijection of 32-bit integers in which every bit depends on every other."""
    bits = (bits ^ ops.right_shift(bits, uint32(16))) * uint32(0x21F0AAAD)
    bits = (bits ^ ops.right_shift(bits, uint32(15))) * uint32(0xD35A2D97)
    return bits ^ ops.right_shift(bits, uint32(15))


def uint32(number):
    return ops.convert_to_tensor(number, "uint32")
