"""Which elements dropout keeps, by random bits that cost little: what depends on the backend is here."""

import keras
from keras import ops

from keras_transformer.ops.hashing import hashed_bits, uint32


def elements_kept(seed, shape, rate, hashed):
    """Draws which elements dropout keeps, the same for the same seed.

    Args:
        seed: int tensor of shape `[2]`, what a `keras.random.SeedGenerator` gives.
        shape: tuple of ints or int tensors.
        rate: float between 0 and 1. Share of the elements that are dropped.
        hashed: boolean. Whether an element's bits are a hash of its place and of the seed, which XLA computes where
            they are read; otherwise, and always on torch, they come from the backend's generator, from TensorFlow's 16
            an element.

    Returns:
        Boolean tensor of that shape, True for what is kept, and the rate by which it was drawn, a float: what is kept
        is to be divided by 1 less that.

    Reference: [lowbias32](https://nullprogram.com/blog/2018/07/31/), the hash.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.dropping import elements_kept
    >>> kept, rate = elements_kept(keras.ops.convert_to_tensor([1, 2]), (64, 64), 0.25, hashed=True)
    >>> bool(0.7 < keras.ops.convert_to_numpy(kept).mean() < 0.8), rate
    (True, 0.25)
    """
    backend = keras.backend.backend()
    if hashed and backend != "torch":
        return hashed_bits(seed, shape) >= uint32(min(round(rate * 2**32), 2**32 - 1)), rate
    if backend == "tensorflow":
        threshold = min(round(rate * 2**16), 2**16 - 1)
        return _drawn(seed, shape, threshold), threshold / 2**16
    return keras.random.uniform(shape, seed=_DrawnSeed(seed)) >= rate, rate


def dropped(x, seed, shape, rate, hashed):
    """Dropout: sets what `elements_kept` does not keep to 0, and scales up the rest.

    Args:
        x: float tensor.
        seed, shape, rate, hashed: as for `elements_kept`; `shape` broadcasts to that of `x`, and `rate` is less than 1.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.dropping import dropped
    >>> y = dropped(keras.ops.ones((64, 64)), keras.ops.convert_to_tensor([1, 2]), (64, 64), 0.5, hashed=True)
    >>> sorted({float(number) for number in keras.ops.convert_to_numpy(y).ravel()})
    [0.0, 2.0]
    """
    keeps, rate = elements_kept(seed, shape, rate, hashed)
    return ops.where(keeps, x * ops.cast(1 / (1 - rate), x.dtype), ops.cast(0, x.dtype))


def _drawn(seed, shape, threshold):
    """Which elements to keep: those whose 16 bits from TensorFlow's generator reach a threshold."""
    import tensorflow as tf

    size = tf.reduce_prod(shape)
    seed = tf.cast(tf.math.floormod(seed, tf.int32.max), "int32")
    words = tf.random.stateless_uniform([(size + 1) // 2], seed, minval=None, maxval=None, dtype=tf.uint32)
    bits = tf.reshape(tf.reshape(tf.bitcast(words, tf.uint16), [-1])[:size], shape)
    return bits >= tf.constant(threshold, tf.uint16)


class _DrawnSeed(keras.random.SeedGenerator):
    """A seed that has been drawn, for Keras' functions to draw with again."""

    _initial_seed = 0  # Not None, by which Keras on torch would know that no seed was asked for.

    def __init__(self, value):
        self.value = value

    def next(self, ordered=True):
        return self.value
