import keras
import numpy as np
from keras import ops

from keras_transformer import scopes
from keras_transformer.ops import first_real
from keras_transformer.ops.masks import set_mask

KINDS = ("sinusoidal", "learned")


@keras.saving.register_keras_serializable(package="keras_transformer")
class PositionalEmbedding(keras.layers.Layer):
    """Adds to each embedding what stands for its position.

    Positions count from the first real token: padding on the left, if `mask` tells of it, shifts nothing. Under a
    `DecodingScope` they go on from the tokens decoded so far.

    Args:
        kind: `"sinusoidal"`, sines and cosines of wavelengths from `2 pi` to `20000 pi`, for any length; or
            `"learned"`, a trained vector for each position.
        max_length: int. Number of positions of a learned table; sinusoidal positions have no limit unless it is given.
        scale: float. Factor of the embeddings before positions are added; the original paper takes `dim ** 0.5`.
        offset: int. The first position is number `offset`: a learned table has this many rows in front, which no
            position reads. RoBERTa and BART take 2.
        interleaved: boolean. Whether sines and cosines take turns, or all sines come first (Marian).
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.
        mask: boolean tensor of shape `[B, T]`, True for real positions. By default the mask that `x` carries.
        positions: int tensor of shape `[B, T]` or `[T]`, less than `max_length`, in place of those that are counted.

    Returns:
        Tensor of shape `[B, T, dim]`.

    Raises:
        ValueError: if `kind` is unknown, a learned table has no `max_length`, `offset` is negative, or the input is
            longer than `max_length`. With a length that TensorFlow only knows at run time this is an
            `InvalidArgumentError`.

    Reference: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.5.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> x = kt.layers.PositionalEmbedding()(np.zeros((1, 3, 4), "float32"))
    >>> [round(float(number), 3) for number in x[0, 1]]  # sin 1, cos 1, sin 0.01, cos 0.01
    [0.841, 0.54, 0.01, 1.0]
    """

    def __init__(self, kind="sinusoidal", max_length=None, scale=1.0, offset=0, interleaved=True, **kwargs):
        super().__init__(**kwargs)
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}; received kind={kind!r}.")
        if max_length is None and kind == "learned":
            raise ValueError("`max_length` must be given for learned positions: it is the size of their table.")
        if offset < 0:
            raise ValueError(f"`offset` must be the number of the first position, 0 or more; received offset={offset}.")
        self.kind = kind
        self.max_length = max_length
        self.scale = scale
        self.offset = offset
        self.interleaved = interleaved
        self.supports_masking = True

    def build(self, input_shape):
        if self.kind == "learned":
            self.position_table = self.add_weight(
                name="position_table",
                shape=(self.max_length + self.offset, input_shape[-1]),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
            )

    def call(self, x, mask=None, x_mask=None, positions=None):
        mask = x_mask if mask is None else mask  # Keras passes `x_mask` where other tensors came along with `x`.
        counted = positions is None
        positions = self._positions(x, mask) if counted else positions  # [T], or [B, T] where rows are padded
        if self.kind == "learned":
            table = ops.convert_to_tensor(self.position_table)
            rows = self.max_length
            # XLA drops the check of an unknown length; a slice too long fails there too.
            if counted and scopes.decoding() is None:
                # The length is that of the positions, so that the slice waits for their check.
                rows = ops.shape(positions)[-1]
            table = ops.slice(table, (self.offset, 0), (rows, x.shape[-1]))
            encoded = ops.take(table, positions, axis=0)
        else:
            encoded = sinusoids(positions + self.offset, x.shape[-1], self.interleaved)
        scopes.record(self, "positions", positions, x, mask)
        encoded = scopes.record(self, "encoded", ops.cast(encoded, x.dtype), positions, x)
        scaled = x if self.scale == 1.0 else x * ops.convert_to_tensor(self.scale, x.dtype)
        scopes.record(self, "scaled", scaled, x)
        return scopes.record(self, "output", scaled + encoded, scaled, encoded)

    def _positions(self, x, mask):
        length = ops.shape(x)[1]
        scope = scopes.decoding()
        if scope is None:
            positions = ops.arange(self._check_length(length), dtype="int32")
            padding = None if mask is None else first_real(mask)
        else:
            positions = scope.positions(length)
            padding = scope.padding_before(scope.call_name(self), mask)
            if padding is None and isinstance(scope.index, int):
                self._check_length(scope.index + length)
        return positions if padding is None else ops.maximum(positions - padding, 0)

    def _check_length(self, length):
        """Returns `length` after checking that there are as many positions."""
        if self.max_length is None:
            return length
        message = f"The input of `{self.name}` must not be longer than max_length={self.max_length}; received length "
        if isinstance(length, int):
            if length > self.max_length:
                raise ValueError(f"{message}{length}.")
        elif keras.backend.backend() == "tensorflow":  # The one backend whose lengths may be unknown until run time.
            import tensorflow as tf

            # What is looked up must wait for the check, or its own error comes first.
            with tf.control_dependencies([tf.debugging.Assert(length <= self.max_length, [message, length])]):
                length = tf.identity(length)
        return length

    def compute_output_spec(self, x, mask=None, x_mask=None, positions=None):
        if positions is None and x.shape[1] is not None:
            self._check_length(x.shape[1])
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "kind": self.kind,
            "max_length": self.max_length,
            "scale": self.scale,
            "offset": self.offset,
            "interleaved": self.interleaved,
        }


def sinusoids(positions, dim, interleaved=True):
    """Sine and cosine of positions `[...]` at `dim / 2` wavelengths, `[..., dim]`: side by side or in two halves."""
    frequencies = ops.convert_to_tensor(10000.0 ** -(np.arange(0, dim, 2) / dim), "float32")
    angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * frequencies
    # [..., ceil(dim / 2), 2] or [..., 2, ceil(dim / 2)]
    pairs = ops.stack([ops.sin(angles), ops.cos(angles)], axis=-1 if interleaved else -2)
    return ops.reshape(pairs, (*ops.shape(angles)[:-1], -1))[..., :dim]


@keras.saving.register_keras_serializable(package="keras_transformer")
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Keras' embedding that is also an output projection, whose mask outlives `quantize`.

    Keras makes the mask of `mask_zero=True` in a part of the call that quantized embeddings do not go through, and what
    comes after takes padding for tokens. The arguments are those of `keras.layers.ReversibleEmbedding`.

    Call arguments:
        inputs: int tensor `[B, T]`; or with `reverse=True` float tensor `[B, T, output_dim]`.
        reverse: boolean. Whether to project onto the vocabulary.

    Returns:
        Tensor `[B, T, output_dim]`; or with `reverse=True` `[B, T, input_dim]`.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.ReversibleEmbedding(10, 4, mask_zero=True)
    >>> layer.build((None, None))
    >>> layer.quantize("int8")
    >>> mask = keras.src.backend.get_keras_mask(layer(np.array([[3, 0]])))
    >>> keras.ops.convert_to_numpy(mask).tolist()
    [[True, False]]
    """

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras refuses subclasses, which may compute something else; this one does not.
        return super().quantize(mode, type_check=False, config=config)

    def quantized_call(self, inputs, reverse=False):
        outputs = super().quantized_call(inputs, reverse=reverse)
        return outputs if reverse else set_mask(outputs, keras.layers.Embedding.compute_mask(self, inputs))
