import keras

from keras_transformer import scopes
from keras_transformer.layers.activations import activate, get_activation
from keras_transformer.layers.checks import check_rate
from keras_transformer.layers.cloning import quantization_config, quantized_dtype
from keras_transformer.layers.dropout import Dropout
from keras_transformer.layers.initialization import RESIDUAL, kernel_initializer
from keras_transformer.layers.sublayers import project


@keras.saving.register_keras_serializable(package="keras_transformer")
class FeedForward(keras.layers.Layer):
    """Position-wise feed-forward network: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` if gated.

    Args:
        hidden_dim: int. Width of the hidden layer.
        activation: str or callable. `"relu"` in the original paper, `"gelu"` in BERT and GPT, `"silu"` with
            `gated=True` in LLaMA (SwiGLU); or one that takes gate and up itself, as `ClampedSwiGLU` does.
        gated: boolean. Whether a second projection gates the hidden layer.
        use_bias: boolean. Whether the projections have biases.
        dropout: float between 0 and 1. Dropout of the hidden layer.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[..., dim]`.
        training: boolean. Whether dropout acts.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: if `hidden_dim` is not positive, `dropout` is not a rate, or `activation` needs a gate.

    References: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), equation 2; gated:
    [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), equation 6.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.FeedForward(64, "silu", gated=True, use_bias=False)
    >>> tuple(layer(np.ones((2, 5, 16), "float32")).shape)
    (2, 5, 16)
    """

    def __init__(self, hidden_dim, activation="gelu", gated=False, use_bias=True, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        if hidden_dim < 1:
            raise ValueError(f"`hidden_dim` must be a positive width; received hidden_dim={hidden_dim}.")
        self.hidden_dim = hidden_dim
        self.activation = get_activation(activation, gated)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = check_rate(dropout, "dropout")
        self.supports_masking = True

    def build(self, input_shape):
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.up = self._projection("up", self.hidden_dim, input_shape)
        if self.gated:
            self.gate = self._projection("gate", self.hidden_dim, input_shape)
        self.down = self._projection("down", input_shape[-1], hidden_shape)
        self.hidden_dropout = Dropout(self.dropout, name="hidden_dropout", dtype=self.dtype_policy)

    def _projection(self, name, units, input_shape):
        layer = keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=kernel_initializer(RESIDUAL),
            quantization_config=quantization_config(self.dtype_policy, name),
            name=name,
            dtype=self.dtype_policy,
        )
        layer.build(input_shape)
        return layer

    def call(self, x, training=None):
        projected = [scopes.record(self, "up", project(self.up, x), x)]
        if self.gated:
            projected.append(scopes.record(self, "gate", project(self.gate, x), x))
        hidden = scopes.record(self, "hidden", activate(self.activation, *projected), *projected)
        output = project(self.down, self.hidden_dropout(hidden, training=training))
        return scopes.record(self, "output", output, hidden)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            **quantized_dtype(self),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
        }
