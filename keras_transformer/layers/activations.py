"""Activations that checkpoints name and Keras does not: functions to hand to a feed-forward layer, and gates of two."""

import keras
from keras import ops

from keras_transformer.ops.slopes import activate_smoothly


@keras.saving.register_keras_serializable(package="keras_transformer")
def gelu_tanh(x):
    """GELU in its approximation by tanh, as GPT-2 and Gemma have it.

    Args:
        x: float tensor.

    Returns:
        Tensor of the shape and dtype of `x`.

    Reference: [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415), section 2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> round(float(kt.layers.gelu_tanh(np.array(1.0, "float32"))), 4)
    0.8412
    """
    return ops.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="keras_transformer")
def quick_gelu(x):
    """GELU in its approximation by a sigmoid, `x * sigmoid(1.702 * x)`, as CLIP has it.

    Args:
        x: float tensor.

    Returns:
        Tensor of the shape and dtype of `x`.

    Reference: [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415), section 2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> round(float(kt.layers.quick_gelu(np.array(1.0, "float32"))), 4)
    0.8458
    """
    return ops.multiply(x, ops.sigmoid(ops.multiply(x, 1.702)))


@keras.saving.register_keras_serializable(package="keras_transformer")
def relu_squared(x):
    """Square of what is positive, and 0 for the rest.

    Args:
        x: float tensor.

    Returns:
        Tensor of the shape and dtype of `x`.

    Reference: [Primer](https://arxiv.org/abs/2109.08668), section 3.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> [float(number) for number in kt.layers.relu_squared(np.array([-2.0, 3.0], "float32"))]
    [0.0, 9.0]
    """
    return ops.square(ops.relu(x))


SMOOTH = (keras.activations.gelu, keras.activations.silu, gelu_tanh, quick_gelu)


class GatedActivation:
    """What a gated feed-forward layer asks of an activation that is more than a function of the gate.

    A subclass combines `gate` and `up`, two tensors of the same shape, in `__call__(gate, up)`.
    """


@keras.saving.register_keras_serializable(package="keras_transformer")
class ClampedSwiGLU(GatedActivation):
    """The gate of gpt-oss: `(up + 1) * gate * sigmoid(alpha * gate)`, with both kept within a limit first.

    It is the `activation` of a `FeedForward` or `MixtureOfExperts` with `gated=True`.

    Args:
        alpha: float. Steepness of the sigmoid.
        limit: float. `gate` is cut off above it, and `up` above it and below its negative.

    Call arguments:
        gate: float tensor.
        up: float tensor of the shape of `gate`.

    Returns:
        Tensor of the shape of `gate`.

    Raises:
        ValueError: if `limit` is not positive.

    References: [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), equation 5;
    [gpt-oss](https://arxiv.org/abs/2508.10925), section 2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.FeedForward(64, kt.layers.ClampedSwiGLU(), gated=True)
    >>> tuple(layer(np.ones((2, 5, 16), "float32")).shape)
    (2, 5, 16)
    """

    def __init__(self, alpha=1.702, limit=7.0):
        if limit <= 0:
            raise ValueError(f"`limit` must be a positive number; received limit={limit}.")
        self.alpha = alpha
        self.limit = limit

    def __call__(self, gate, up):
        gate = ops.minimum(gate, ops.cast(self.limit, gate.dtype))
        return (ops.clip(up, -self.limit, self.limit) + 1) * gate * ops.sigmoid(self.alpha * gate)

    def get_config(self):
        return {"alpha": self.alpha, "limit": self.limit}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def get_activation(activation, gated):
    """The function that Keras knows by a name or configuration, refused where it would lack a gate."""
    function = keras.activations.get(activation)
    if isinstance(function, GatedActivation) and not gated:
        raise ValueError(f"`activation={type(function).__name__}` combines two projections, so it needs `gated=True`.")
    return function


def activate(activation, up, gate=None):
    """The hidden layer that an activation makes of its one projection, or of two where there is a gate."""
    if isinstance(activation, GatedActivation):
        return activation(gate, up)
    x = up if gate is None else gate
    hidden = activate_smoothly(activation, x) if activation in SMOOTH else activation(x)
    return hidden if gate is None else hidden * up
