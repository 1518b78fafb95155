"""Products and sums of training in the form that a backend computes fast: what depends on it is here."""

import functools

import keras
from keras import ops

from keras_transformer.ops.dropping import dropped
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
    if not sums_are_products():
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
    return _softmax_by_products()((x,), ()) if sums_are_products() else ops.softmax(x, axis=-1)


def trained_attention(scores, value, rate=0.0, seed=None):
    """Sums of `value`, weighted by the softmax of scores, for a program that TensorFlow's XLA compiles for a CPU, and
    that also computes its gradient.

    That of the softmax needs, for each query, the sum of its weights times their gradients. Those are the same as the
    result times its own gradient, summed over the width of a head, which is less to read than all keys.

    Args:
        scores: float32 tensor of shape `[B, H, T, S]`.
        value: float32 tensor of shape `[B, K, S, D]`, where `K` divides `H`.
        rate: float between 0 and 1. Dropout of the weights.
        seed: int tensor of shape `[2]`, what a `keras.random.SeedGenerator` gives, where `rate` is not 0.

    Returns:
        Tensor of shape `[B, K, H / K * T, D]`.

    References: [FlashAttention](https://arxiv.org/abs/2205.14135), appendix B.2.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.products import trained_attention
    >>> tuple(trained_attention(keras.ops.ones((2, 6, 5, 4)), keras.ops.ones((2, 3, 4, 8))).shape)
    (2, 3, 10, 8)
    """
    return _attention_by_products(rate)((scores, value), () if seed is None else (seed,))


def trained_bias(x, bias):
    """`x + bias`, for a program that TensorFlow's XLA compiles for a CPU, and that also computes its gradient.

    That of the bias sums over all rows, which XLA leaves to a single core, in windows of 32 rows that it writes to
    memory. Here it is a product with ones: 0.2 ms in place of 0.4 for 2,048 rows of 256.

    Args:
        x: float tensor of shape `[..., N]`.
        bias: tensor of shape `[N]` and the dtype of `x`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.products import trained_bias
    >>> keras.ops.convert_to_numpy(trained_bias(keras.ops.zeros((1, 2)), keras.ops.ones(2))).tolist()
    [[1.0, 1.0]]
    """
    return _bias_by_products()((x, bias), ())


def trained_norm(x, scale, offset=None, epsilon=1e-6):
    """Normalization of the last axis, for a program that TensorFlow's XLA compiles for a CPU, and that also computes
    its gradient: all sums, over the axis and over the rows, are products with ones.

    Args:
        x: float tensor of shape `[..., N]`.
        scale: tensor of shape `[N]` and the dtype of `x`.
        offset: the same, or None: with one this is layer normalization, without one that by the root mean square.
        epsilon: float, added to the variance or to the mean square.

    Returns:
        Tensor of the shape and dtype of `x`.

    References: [Layer Normalization](https://arxiv.org/abs/1607.06450), section 3;
    [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), equation 4.

    Example:

    >>> import keras, numpy as np
    >>> from keras_transformer.ops.products import trained_norm
    >>> y = trained_norm(np.array([[3.0, 1.0]], "float32"), keras.ops.ones(2), keras.ops.zeros(2))
    >>> keras.ops.convert_to_numpy(y).round(3).tolist()
    [[1.0, -1.0]]
    """
    parameters = (scale,) if offset is None else (scale, offset)
    return _norm_by_products(epsilon)((ops.convert_to_tensor(x), *parameters), ())


def sums_are_products():
    """Whether sums of training are best computed as products: in a program of TensorFlow's XLA for CPUs."""
    return keras.backend.backend() == "tensorflow" and compiled_by_xla_for_cpu()


@functools.cache
def _softmax_by_products():
    def forward(tensors, _):
        weights = _softmax(tensors[0])
        return weights, (weights,)

    def backward(tensors, _, kept, gradient):
        (weights,) = kept
        return (weights * (gradient - _sums_of_rows(weights * gradient)),)

    return with_gradient(forward, backward)


def _softmax(x):
    exponentials = ops.exp(x - ops.max(x, axis=-1, keepdims=True))
    return exponentials / _sums_of_rows(exponentials)


@functools.cache
def _attention_by_products(rate):
    def drop(x, seed):
        return dropped(x, *seed, ops.shape(x), rate, hashed=True) if seed else x

    def by_key_heads(x, value):
        batch, heads, length, width = ops.shape(x)
        return ops.reshape(x, (batch, value.shape[1], heads // value.shape[1] * length, width))

    def forward(tensors, seed):
        scores, value = tensors
        weights = _softmax(scores)
        output = product(by_key_heads(drop(weights, seed), value), value)
        return output, (weights, output)

    def backward(tensors, seed, kept, gradient):
        _, value = tensors
        weights, output = kept
        of_value = _gradient_of_second(by_key_heads(drop(weights, seed), value), gradient)
        of_weights = drop(ops.reshape(product(gradient, value, y_transposed=True), ops.shape(weights)), seed)
        sums = ops.reshape(_sums_of_rows(gradient * output), (*ops.shape(weights)[:3], 1))
        return weights * (of_weights - sums), of_value

    return with_gradient(forward, backward)


@functools.cache
def _bias_by_products():
    def forward(tensors, _):
        x, bias = tensors
        return x + bias, ()

    def backward(tensors, _, kept, gradient):
        return gradient, _sum_of_rows(gradient)

    return with_gradient(forward, backward)


@functools.cache
def _norm_by_products(epsilon):
    def mean(x):
        return _sums_of_rows(x) / x.shape[-1]

    def forward(tensors, _):
        x, scale, *offset = tensors
        middle = mean(x) if offset else None
        x = x - middle if offset else x
        factor = ops.rsqrt(mean(x * x) + epsilon)
        y = x * factor * scale
        return (y + offset[0], (factor, middle)) if offset else (y, (factor,))

    def backward(tensors, _, kept, gradient):
        x, scale, *offset = tensors
        factor, *middle = kept
        normalized = (x - middle[0] if offset else x) * factor
        of_normalized = gradient * scale
        of_x = of_normalized - normalized * mean(of_normalized * normalized)
        of_x = (of_x - mean(of_normalized) if offset else of_x) * factor
        of_scale = _sum_of_rows(gradient * normalized)
        return (of_x, of_scale, _sum_of_rows(gradient)) if offset else (of_x, of_scale)

    return with_gradient(forward, backward)


def _sum_of_rows(x):
    """`[..., N]` to `[N]`. Of two rows of ones: one would be merged with what makes `x`, in a slow order."""
    x = ops.reshape(x, (-1, x.shape[-1]))
    return product(ops.ones((2, ops.shape(x)[0]), x.dtype), x)[0]


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
        factors = (gradient, x) if y_transposed else (x, gradient)
        return product(gradient, y, y_transposed=not y_transposed), _gradient_of_second(*factors)

    return with_gradient(forward, backward)


def _gradient_of_second(wide, narrow):
    """Sum over the rows of both, `[B, K, R, M]` and `[B, K, R, N]`, to `[B, K, M, N]`."""
    return _result_transposed(product(_operand_transposed(narrow), wide))


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
