"""Vectors of another kind in a sequence of tokens: images in a text."""

import keras
from keras import ops

from keras_transformer import scopes


@keras.saving.register_keras_serializable(package="keras_transformer")
class Placeholders(keras.layers.Layer):
    """Puts the vectors of an image, or of a sound, where a text holds a place for them.

    The first placeholder of a row gives way to the first vector of this row, the second to the second, and so on. A row
    has as many placeholders as vectors; one that is left over keeps its embedding. Under a `DecodingScope` the count
    goes on from call to call, so that a placeholder the model itself generates is a token like any other.

    Args:
        token_id: int. The token that holds a place.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`. The embedded tokens.
        token_ids: int tensor of shape `[B, T]`.
        vectors: float tensor of shape `[B, count, dim]`.

    Returns:
        Tensor of shape `[B, T, dim]`.

    Raises:
        ValueError: if `token_id` is negative, or `vectors` are not as wide as `x`.

    Reference: [Visual Instruction Tuning](https://arxiv.org/abs/2304.08485), section 4.1.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> x, vectors = np.zeros((1, 4, 2), "float32"), np.array([[[1, 2], [3, 4]]], "float32")
    >>> filled = kt.layers.Placeholders(9)(x, np.array([[5, 9, 9, 6]]), vectors)
    >>> keras.ops.convert_to_numpy(filled)[0].tolist()
    [[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    """

    def __init__(self, token_id, **kwargs):
        super().__init__(**kwargs)
        if token_id < 0:
            raise ValueError(f"`token_id` must be the number of a token; received token_id={token_id}.")
        self.token_id = token_id
        self.count = None
        self.supports_masking = True

    def build(self, x_shape, token_ids_shape, vectors_shape):
        self._check(x_shape, vectors_shape)
        self.count = vectors_shape[1]

    def call(self, x, token_ids, vectors):
        held = ops.equal(token_ids, self.token_id)  # [B, T]
        number = ops.cumsum(ops.cast(held, "int32"), axis=-1) + self._before(held)  # from 1
        held = ops.logical_and(held, number <= ops.shape(vectors)[1])
        places = ops.expand_dims(ops.where(held, number - 1, 0), -1)
        return ops.where(
            ops.expand_dims(held, -1), ops.take_along_axis(ops.cast(vectors, x.dtype), places, axis=1), x
        )  # [B, T, dim]

    def _before(self, held):
        """How many placeholders each row had in earlier calls: int32 `[B, 1]`, or 0."""
        scope = scopes.decoding()
        if scope is None:
            return 0
        name = scope.call_name(self)
        before = scope.cache.get(name, {}).get("count", ops.zeros_like(held[:, :1], dtype="int32"))
        scope.cache[name] = {"count": before + ops.sum(ops.cast(held, "int32"), axis=-1, keepdims=True)}
        return before

    @staticmethod
    def _check(x_shape, vectors_shape):
        if len(vectors_shape) != 3 or vectors_shape[-1] != x_shape[-1]:
            raise ValueError(
                f"`vectors` must have shape (batch, count, {x_shape[-1]}) to stand among the tokens; received "
                f"{tuple(vectors_shape)}."
            )

    def compute_output_spec(self, x, token_ids, vectors):
        self._check(x.shape, vectors.shape)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "token_id": self.token_id}
