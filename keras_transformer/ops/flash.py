"""Attention that never holds the scores, by the kernels that JAX and torch have for it: what depends on them is here.

These kernels know causality and the lengths of sequences by themselves. A mask as a tensor takes them off their way, or
has them compute a gradient for it, so none is made here: not for the scores that causality hides, and not for padding.
"""

import keras
from keras import ops

JAX_KERNEL = "cudnn"


def flash_attention(query, key, value, causal, padding, scale, otherwise):
    """Computes attention under causality and padding alone, or returns None where there is no kernel for it.

    Args:
        query: float tensor of shape `[B, H, T, D]`.
        key: float tensor of shape `[B, K, S, D]`.
        value: float tensor of shape `[B, K, S, E]`.
        causal: boolean. Whether query t sees keys 0 to t alone.
        padding: boolean tensor of shape `[B, S]`, True for real keys, or None.
        scale: float. Factor of the scores.
        otherwise: function `(query, key, value, padding)` that gives the same for any padding, at any price.

    Returns:
        Tensor of shape `[B, H, T, E]`, or None.

    Example:

    >>> from keras_transformer.ops.flash import flash_attention
    >>> x = keras.ops.ones((1, 2, 3, 4))
    >>> result = flash_attention(x, x, x, True, None, 0.5, None)
    >>> result is None or tuple(result.shape) == (1, 2, 3, 4)
    True
    """
    backend = keras.backend.backend()
    if backend == "jax" and _jax_kernel_takes(query, key, value):
        return _jax_attention(query, key, value, causal, padding, scale, otherwise)
    if backend == "torch" and _torch_kernel_takes(query, padding):
        import torch

        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=bool(query.shape[1] != key.shape[1])
        )
    return None


def prefers_products(query):
    """Whether plain products are the faster way for a single query: JAX on a GPU, whose kernel wants caches re-laid."""
    return query.shape[2] == 1 and _on_jax_gpu()


def _on_jax_gpu():
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def _is_half(x):
    return keras.backend.standardize_dtype(x.dtype) in ("bfloat16", "float16")


def _jax_kernel_takes(query, key, value):
    """What cuDNN's kernel asks for on every card that has it."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return _on_jax_gpu() and _is_half(query) and same and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


def _jax_attention(query, key, value, causal, padding, scale, otherwise):
    import jax

    def attend(query, key, value, lengths):
        length, (query, key, value) = query.shape[2], (ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
        if key.shape[1] % 2 and lengths is None:
            lengths = ops.full((key.shape[0],), key.shape[1], dtype="int32")
        query, key, value = (_with_even_length(x) for x in (query, key, value))
        output = jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation=JAX_KERNEL
        )
        return ops.transpose(output[:, :length], (0, 2, 1, 3))

    if padding is None:
        return attend(query, key, value, None)

    # The kernel knows how many keys of a row are real, not which: padding at the end.
    def by_lengths(query, key, value, padding):
        lengths = ops.sum(ops.cast(padding, "int32"), axis=-1)  # [B]
        output = attend(query, key, value, ops.maximum(lengths, 1))
        return ops.where(lengths[:, None, None, None] > 0, output, ops.zeros_like(output))

    padding = ops.broadcast_to(padding, (query.shape[0], key.shape[2]))
    if causal:
        return _mended(by_lengths, otherwise)(query, key, value, padding)
    order = ops.argsort(ops.logical_not(padding), axis=-1)  # A stable one: real keys come first.
    key, value = (_in_order(x, order) for x in (key, value))
    return by_lengths(query, key, value, padding)


def _in_order(x, order):
    """Keys or values [B, K, S, D] in another order [B, S], each once, which the gradient need not add up for."""
    import jax

    taken = jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))
    return ops.transpose(taken(ops.transpose(x, (0, 2, 1, 3)), order), (0, 2, 1, 3))


def _mended(by_lengths, otherwise):
    """The function `by_lengths`, and in its place `otherwise` where a row's padding is not at its end.

    The kernel computes in any case, and what it got wrong, which is seldom, is computed again, its gradient as well.
    A choice between the two would cost more: XLA copies what goes into it, what comes out of it, and what it keeps for
    the gradient. A loop of no or one round changes its results in place.
    """
    import jax

    def mended(results, padding, function):
        lengths = ops.sum(ops.cast(padding, "int32"), axis=-1, keepdims=True)  # [B, 1]
        wrong = ops.any(padding != (ops.arange(padding.shape[1]) < lengths))
        return jax.lax.while_loop(lambda state: state[0], lambda _: (False, function()), (wrong, results))[1]

    def forward(query, key, value, padding):
        output, derive = jax.vjp(lambda *x: by_lengths(*x, padding), query, key, value)
        output = mended(output, padding, lambda: otherwise(query, key, value, padding))
        return output, (derive, query, key, value, padding)

    def backward(kept, upstream):
        derive, query, key, value, padding = kept

        def derive_otherwise():
            return jax.vjp(lambda *x: otherwise(*x, padding), query, key, value)[1](upstream)

        return *mended(derive(upstream), padding, derive_otherwise), None

    attention = jax.custom_vjp(lambda *x: forward(*x)[0])
    attention.defvjp(forward, backward)
    return attention


def _with_even_length(x):
    """The gradient of cuDNN's kernel is not there for odd lengths: `[B, T, H, D]` with one of zeros behind these."""
    return ops.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def refuses_gradient(query, key, mask, bias):
    """Whether Keras would take a kernel of JAX that refuses to be derived: with a mask or bias, for odd lengths."""
    given = mask is not None or bias is not None
    return given and _is_half(query) and (query.shape[2] % 2 or key.shape[2] % 2) and _on_jax_gpu()


def _torch_kernel_takes(query, padding):
    import torch

    if query.is_meta or (query.device.type == "cpu" and query.dtype == torch.float16):
        return False
    if padding is None:
        return True
    if type(padding) is not torch.Tensor or padding.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # Asking waits for the device: once a mask, not once a layer.
    if not hasattr(padding, "_all_are_real"):
        padding._all_are_real = bool(padding.all())
    return padding._all_are_real
