"""Products and sums of attention in the form that a backend computes fast: what depends on it is here."""

import functools

import keras
from keras import ops

from keras_transformer.ops.looping import compiled_by_xla_for_cpu, with_gradient


def product(x, y, x_transposed=False, y_transposed=False):
    """Matrix product of the last two axes, of which a transpose is not written out: XLA does not take one back."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.matmul(x, y, transpose_a=x_transposed, transpose_b=y_transposed)
    if keras.backend.backend() == "jax":
        return ops.einsum(f"...{'kr' if x_transposed else 'rk'},...{'ck' if y_transposed else 'kc'}->...rc", x, y)
    x, y = (ops.swapaxes(x, -1, -2) if flip else x for x, flip in ((x, x_transposed), (y, y_transposed)))
    return ops.matmul(x, y)


def trained_product(x, y, y_transposed=False):
    """`product` of two tensors of four axes, for a program that also computes its gradient.

    The gradient of `y` sums over rows, those of `x` and those of the result. TensorFlow's XLA leaves such batches to a
    single core of the CPU, at less than half of the speed that each of the two has otherwise; so there the narrower one
    of `x` and the result is written out transposed, and the product with it is the transposed gradient.

    Args:
        x: float tensor of shape `[B, K, R, M]`.
        y: float tensor of shape `[B, K, M, N]`, or `[B, K, N, M]` with `y_transposed=True`.
        y_transposed: boolean.

    Returns:
        Tensor of shape `[B, K, R, N]`.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.products import trained_product
    >>> tuple(trained_product(keras.ops.ones((2, 3, 5, 4)), keras.ops.ones((2, 3, 7, 4)), y_transposed=True).shape)
    (2, 3, 5, 7)
    """
    if not _by_xla_of_tensorflow():
        return product(x, y, y_transposed=y_transposed)
    return _with_transposed_gradient(y_transposed)((x, y), ())


def trained_softmax(x):
    """Softmax over the last axis, for a program that also computes its gradient.

    TensorFlow's XLA sums rows on a single core of the CPU, and for the gradient in windows of 32 that it writes to
    memory. Here the sums are products with a column of ones, and so is that of the gradient.

    Args:
        x: float tensor of shape `[..., N]`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_transformer.ops.products import trained_softmax
    >>> keras.ops.convert_to_numpy(trained_softmax(np.array([[0.0, 0.0]], "float32"))).tolist()
    [[0.5, 0.5]]
    """
    return _softmax_by_products()((x,), ()) if _by_xla_of_tensorflow() else ops.softmax(x, axis=-1)


def _by_xla_of_tensorflow():
    return keras.backend.backend() == "tensorflow" and compiled_by_xla_for_cpu()


@functools.cache
def _softmax_by_products():
    def forward(tensors, _):
        exponentials = ops.exp(tensors[0] - ops.max(tensors[0], axis=-1, keepdims=True))
        weights = exponentials / _sums_of_rows(exponentials)
        return weights, (weights,)

    def backward(tensors, _, kept, gradient):
        (weights,) = kept
        return (weights * (gradient - _sums_of_rows(weights * gradient)),)

    return with_gradient(forward, backward)


def _sums_of_rows(x):
    """`[..., N]` to `[..., 1]`."""
    *sizes, width = ops.shape(x)
    sums = product(ops.reshape(x, (-1, width)), ops.ones((width, 1), x.dtype))
    return ops.reshape(sums, (*sizes, 1))


@functools.cache
def _with_transposed_gradient(y_transposed):
    def forward(tensors, _):
        return product(*tensors, y_transposed=y_transposed), ()

    def backward(tensors, _, kept, gradient):
        x, y = tensors
        narrow, wide = (x, gradient) if y_transposed else (gradient, x)
        of_x = product(gradient, y, y_transposed=not y_transposed)
        return of_x, _result_transposed(product(_operand_transposed(narrow), wide))

    return with_gradient(forward, backward)


def _operand_transposed(x):
    """`[B, K, R, N]` to `[B, K, N, R]` by way of all heads at once: XLA takes a mere transpose into the product."""
    batch, heads, rows, width = ops.shape(x)
    x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, rows, heads * width))
    return ops.reshape(ops.transpose(x, (0, 2, 1)), (batch, heads, width, rows))


def _result_transposed(x):
    """The same of a product, out of which XLA takes no transpose behind a reshape."""
    batch, heads, width, rows = ops.shape(x)
    x = ops.transpose(ops.reshape(x, (batch, heads * width, rows)), (0, 2, 1))
    return ops.transpose(ops.reshape(x, (batch, rows, heads, width)), (0, 2, 1, 3))
