"""How the scores of attention become weights, where it is not the softmax alone."""

import keras
from keras import ops

from keras_transformer.ops.attention import hide_masked, masked_softmax


class AttentionSoftmax(keras.layers.Layer):
    """What attention asks of its `softmax`: to turn scores into weights.

    Attention calls `to_weights`, not the layer: its scores have more precision than a half-precision policy would
    leave them. Rows that may attend to nothing are its own concern.
    """

    def to_weights(self, scores, mask):
        """Weights for scores `[B, heads, T, S]`, of float32 at least, under a mask that broadcasts to them, or None."""
        raise NotImplementedError

    def call(self, scores, mask=None):
        precise = ops.cast(scores, keras.backend.result_type(scores.dtype, "float32"))
        return ops.cast(self.to_weights(precise, mask), scores.dtype)

    def compute_output_spec(self, scores, mask=None):
        return keras.KerasTensor(scores.shape, dtype=self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_transformer")
class SoftCap(AttentionSoftmax):
    """Softmax of scores that are kept between `-cap` and `cap`: `softmax(cap * tanh(scores / cap))`.

    A bias on the scores is capped with them; the mask comes after.

    Args:
        cap: float. The largest score.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        scores: float tensor of shape `[B, heads, T, S]`.
        mask: boolean tensor that broadcasts to `scores`, True = attend, or None.

    Returns:
        Tensor of the shape of `scores`: the weights.

    Raises:
        ValueError: if `cap` is not positive.

    Reference: [Gemma 2](https://arxiv.org/abs/2408.00118), section 2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.MultiHeadSelfAttention(8, softmax=kt.layers.SoftCap(50.0))
    >>> tuple(layer(np.ones((2, 5, 64), "float32")).shape)
    (2, 5, 64)
    """

    def __init__(self, cap, **kwargs):
        super().__init__(**kwargs)
        if cap <= 0:
            raise ValueError(f"`cap` must be a positive number, the largest score; received cap={cap}.")
        self.cap = cap

    def to_weights(self, scores, mask):
        return masked_softmax(self.cap * ops.tanh(scores / self.cap), mask)

    def get_config(self):
        return {**super().get_config(), "cap": self.cap}


@keras.saving.register_keras_serializable(package="keras_transformer")
class AttentionSinks(AttentionSoftmax):
    """Softmax with one more score for each head, a learned one, that takes its share of the weights and adds nothing.

    A head can so attend to little: its weights sum to less than 1.

    Args:
        num_heads: int. Number of query heads of the attention.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        scores: float tensor of shape `[B, num_heads, T, S]`.
        mask: boolean tensor that broadcasts to `scores`, True = attend, or None.

    Returns:
        Tensor of the shape of `scores`: the weights.

    Raises:
        ValueError: if `num_heads` is not positive.

    References: [Efficient Streaming Language Models with Attention Sinks](https://arxiv.org/abs/2309.17453), section
    3.3; [gpt-oss](https://arxiv.org/abs/2508.10925), section 2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> weights = kt.layers.AttentionSinks(1)(np.zeros((1, 1, 1, 3), "float32"))  # The sink starts at 0, too.
    >>> [float(weight) for weight in weights[0, 0, 0]]
    [0.25, 0.25, 0.25]
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        if num_heads < 1:
            raise ValueError(f"`num_heads` must be positive; received num_heads={num_heads}.")
        self.num_heads = num_heads

    def build(self, scores_shape):
        self.sinks = self.add_weight(name="sinks", shape=(self.num_heads,), initializer="zeros", autocast=False)

    def to_weights(self, scores, mask):
        sinks = ops.reshape(ops.cast(self.sinks, scores.dtype), (-1, 1, 1))
        scores = hide_masked(scores, mask)
        largest = ops.stop_gradient(ops.maximum(ops.max(scores, axis=-1, keepdims=True), sinks))  # [B, H, T, 1]
        exponentials = ops.exp(scores - largest)
        return exponentials / (ops.sum(exponentials, axis=-1, keepdims=True) + ops.exp(sinks - largest))

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads}
