"""Activations in the form that a backend computes and derives fast: what depends on it is here."""

import functools

import keras
from keras import ops

from keras_transformer.ops.looping import compiled_by_xla


def activate_smoothly(activation, x):
    """Computes a smooth activation of one argument, on JAX keeping for its gradient nothing but its slope at `x`.

    JAX' own gradient keeps each step whose derivative is not a constant, and XLA writes them all to memory: beside the
    hidden layer of GPT-2 two more tensors of its size. Forward mode and further derivatives are there as well. GELU is
    computed by `erf`, in float32 also in a program of TensorFlow's XLA: Keras takes that of the backend, by `erfc`, for
    which XLA computes two polynomials and an exponential.

    Args:
        activation: function of one tensor, element by element.
        x: float tensor.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_transformer.ops.slopes import activate_smoothly
    >>> round(float(activate_smoothly(keras.activations.gelu, np.array(1.0, "float32"))), 4)
    0.8413
    """
    if keras.backend.backend() != "jax":
        single = keras.backend.standardize_dtype(x.dtype) == "float32"
        quicker = activation is keras.activations.gelu and single and _compiled_by_tensorflow()
        return _by_erf(x) if quicker else activation(x)
    return _with_slope(_by_erf if activation is keras.activations.gelu else activation)(ops.convert_to_tensor(x))


def _compiled_by_tensorflow():
    return keras.backend.backend() == "tensorflow" and compiled_by_xla()


def _by_erf(x):
    """GELU as Hendrycks and Gimpel write it."""
    return x * (0.5 * (1.0 + ops.erf(x * 0.5**0.5)))


@functools.cache
def _with_slope(activation):
    import jax

    def in_float32(x):  # Steps in half precision would each be rounded.
        return activation(ops.cast(x, keras.backend.result_type(x.dtype, "float32")))

    function = jax.custom_jvp(lambda x: ops.cast(in_float32(x), x.dtype))

    @function.defjvp
    def derive(primals, tangents):
        (x,), (tangent,) = primals, tangents
        value, slope = jax.jvp(in_float32, (x,), (ops.ones_like(x),))
        return ops.cast(value, x.dtype), ops.cast(slope, x.dtype) * tangent

    return function
