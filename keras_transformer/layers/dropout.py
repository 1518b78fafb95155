"""Keras' dropout, by random bits that cost less."""

import keras
from keras import ops

from keras_transformer.ops.dropping import dropped
from keras_transformer.ops.looping import compiled_by_xla


@keras.saving.register_keras_serializable(package="keras_transformer")
class Dropout(keras.layers.Dropout):
    """Sets a random share of the input to zero in training, and scales up the rest, as `keras.layers.Dropout` does.

    Only the random bits differ. XLA on a CPU spends more time on those of a generator such as Philox than on the rest
    of a young block: here, wherever a program is compiled by XLA, each element's bits are a hash of its place and of
    the seed, which is computed where it is read and never lies in memory. TensorFlow without XLA takes 16 bits an
    element from its own generator, half of what Keras takes, so that a rate counts in steps of 1/65,536. torch drops
    elements by its own function.

    Args:
        rate: float between 0 and 1. Share of the elements that become zero; 1 drops all.
        noise_shape: tuple of ints or None. Shape of the random bits, which broadcasts to that of the input; None stands
            for the input's own size.
        seed: int.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: float tensor.
        training: boolean. Whether anything is dropped.

    Returns:
        Tensor of the shape of `inputs`.

    References: [Dropout](https://jmlr.org/papers/v15/srivastava14a.html), section 4;
    [lowbias32](https://nullprogram.com/blog/2018/07/31/), the hash.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> y = keras.ops.convert_to_numpy(kt.layers.Dropout(0.5, seed=1)(np.ones((64, 64), "float32"), training=True))
    >>> sorted({float(number) for number in y.ravel()}), bool(0.45 < (y == 0).mean() < 0.55)
    ([0.0, 2.0], True)
    """

    def call(self, inputs, training=False):
        if not training or not 0 < self.rate < 1 or keras.backend.backend() == "torch":
            return super().call(inputs, training=training)
        seed, shape = self.seed_generator.next(), self._noise_shape(inputs)
        return dropped(inputs, seed, shape, self.rate, hashed=compiled_by_xla())

    def _noise_shape(self, inputs):
        sizes = ops.shape(inputs)
        return tuple(
            size if noise is None else noise for size, noise in zip(sizes, self.noise_shape or sizes, strict=True)
        )
