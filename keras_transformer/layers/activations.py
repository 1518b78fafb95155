"""Activations that checkpoints name and Keras does not: functions to hand to a feed-forward layer, and gates of two."""

import keras
from keras import ops


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
    return x * ops.sigmoid(1.702 * x)


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
