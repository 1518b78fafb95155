"""Sequences of spectra, made shorter before attention reads them."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_transformer")
class FrameSubsampling(keras.layers.Layer):
    """Halves a sequence of frames several times, by convolutions along it.

    Each convolution reads three frames at every second of them, and what `mask` leaves out counts as zeros, so that
    padding changes nothing. A sequence of `T` frames becomes one of `T / 2`, rounded up, each time. If `x` carries a
    mask, the result carries one.

    Args:
        dim: int. Width of the result, and between the convolutions.
        convolutions: int. Number of convolutions: 2 for a quarter of the frames.
        activation: str or callable. What follows each convolution.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, features]`.
        mask: boolean tensor of shape `[B, T]`, True for real frames. By default the mask that `x` carries.

    Returns:
        Tensor of shape `[B, ceil(T / 2 ** convolutions), dim]`.

    Raises:
        ValueError: if `dim` or `convolutions` is not positive.

    References: [Speech-Transformer](https://ieeexplore.ieee.org/document/8462506), section 3.1;
    [End-to-end ASR: from Supervised to Semi-Supervised Learning](https://arxiv.org/abs/1911.08460), section 2.1, for
    convolutions along time alone.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tuple(kt.layers.FrameSubsampling(64)(np.zeros((2, 101, 80), "float32")).shape)
    (2, 26, 64)
    """

    def __init__(self, dim, convolutions=2, activation="gelu", **kwargs):
        super().__init__(**kwargs)
        if dim < 1 or convolutions < 1:
            raise ValueError(
                f"`dim` and `convolutions` must be positive; received dim={dim}, convolutions={convolutions}."
            )
        self.dim = dim
        self.convolutions = convolutions
        self.activation = keras.activations.get(activation)
        self.supports_masking = True

    def build(self, input_shape):
        self.layers = []
        for i in range(self.convolutions):
            # Padded by hand: where "same" puts the zeros depends on the length, and so on what is in the batch.
            options = {"padding": "valid", "data_format": "channels_last", "kernel_initializer": "he_normal"}
            layer = keras.layers.Conv1D(
                self.dim, 3, strides=2, name=f"convolution_{i}", dtype=self.dtype_policy, **options
            )
            layer.build((input_shape[0], None, input_shape[-1] if i == 0 else self.dim))
            self.layers.append(layer)

    def call(self, x, mask=None):
        for layer in self.layers:
            x = _without_padding(x, mask)
            x = self.activation(layer(ops.pad(x, ((0, 0), (1, 1), (0, 0)))))
            mask = _halved(mask)
        return _without_padding(x, mask)

    def compute_mask(self, inputs, previous_mask):
        for _ in range(self.convolutions):
            previous_mask = _halved(previous_mask)
        return previous_mask

    def compute_output_shape(self, input_shape):
        batch, length, _ = input_shape
        return (batch, None if length is None else -(-length // 2**self.convolutions), self.dim)

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "convolutions": self.convolutions,
            "activation": keras.activations.serialize(self.activation),
        }


def _without_padding(x, mask):
    return x if mask is None else ops.where(ops.expand_dims(mask, -1), x, 0)


def _halved(mask):
    return None if mask is None else mask[:, ::2]
