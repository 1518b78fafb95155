"""Scaled dot-product attention: one function, several kernels, all equal."""

import functools

import keras
from keras import ops

from keras_transformer.ops.blockwise import blockwise_attention, blockwise_pays
from keras_transformer.ops.flash import flash_attention, prefers_products, refuses_gradient
from keras_transformer.ops.masks import make_attention_mask, with_head_axis
from keras_transformer.ops.products import (
    product,
    sums_are_products,
    trained_attention,
    trained_product,
    trained_softmax,
)

KERNELS = ("auto", "plain", "fused", "blockwise")
FEW = 8


def dot_product_attention(
    query,
    key,
    value,
    mask=None,
    bias=None,
    scale=None,
    dropout=None,
    softmax=None,
    kernel="auto",
    return_weights=False,
    record=None,
    causal=False,
    padding=None,
    sliding_window=None,
    training=False,
):
    """Computes `softmax(scale * query @ key^T + bias) @ value` under a mask.

    A query that may attend to no key gets exactly 0, with finite gradients, in every dtype and from every kernel.
    Scores and softmax are computed in float32 at least.

    Args:
        query: float tensor of shape `[B, H, T, D]`.
        key: float tensor of shape `[B, K, S, D]`, where `K` divides `H`: with `K < H` the heads share keys and values
            (grouped-query attention; multi-query for `K = 1`).
        value: float tensor of shape `[B, K, S, E]`.
        mask: boolean tensor, True = attend, of shape `[T, S]`, `[B|1, T|1, S]` or `[B|1, H|1, T|1, S]`, or None.
        bias: float tensor added to the scaled scores, of shape `[B|1, H|1, T, S]`, or None.
        scale: float. Default `D ** -0.5`.
        dropout: function applied to the weights, or None; for the blockwise kernel a `keras.layers.Dropout`, whose rate
            and seed it draws with block by block, to draw the same again for the gradient.
        softmax: function `(scores, mask)` to weights, where scores `[B, H, T, S]` have the bias in them already and the
            mask is one that broadcasts to them, or None; by default `masked_softmax`. Only the plain kernel takes it.
        kernel: `"plain"`, written out in `keras.ops`, the reference; `"fused"`, the backend's own kernel;
            `"blockwise"`, a block of queries at a time, with memory linear in the length; or `"auto"`: blockwise where
            `blockwise_pays`, the fused kernel where it is the faster one (JAX and torch) and can do what is asked for.
        return_weights: boolean. Whether to also return the attention weights (only the plain kernel has them).
        record: function `(name, tensor, *sources)` to call with each intermediate of the plain kernel, or None: `mask`,
            `bias`, `scores`, `scaled_scores`, `biased_scores`, `masked_scores` (where the softmax is the default one),
            `weights` and `attended`.
        causal: boolean. Whether query t attends to keys 0 to t alone. A mask could say so as well, but a kernel that is
            told computes nothing for what is hidden.
        padding: boolean tensor of shape `[B, S]`, True for real keys, or None. A mask could say this as well.
        sliding_window: int or None. Query t attends to keys less than so many positions away from t alone.
        training: boolean. Whether a gradient will be asked for: the plain kernel then takes `trained_product` and
            `trained_softmax`, or `trained_attention`.

    Returns:
        Tensor of shape `[B, H, T, E]` in the dtype of `value`; with `return_weights=True` a tuple of it and the weights
        `[B, H, T, S]`, before dropout.

    Raises:
        ValueError: if `K` does not divide `H`, `kernel` is unknown, or a kernel is asked for what it cannot do.

    Reference: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), equation 1; grouped queries:
    [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> query = np.zeros((1, 8, 3, 16), "float32")
    >>> key = value = np.ones((1, 2, 5, 16), "float32")
    >>> tuple(kt.ops.dot_product_attention(query, key, value).shape)
    (1, 8, 3, 16)
    """
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` must be one of {KERNELS}; received kernel={kernel!r}.")
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            "The number of query heads must be a multiple of the number of key-value heads; received "
            f"{query.shape[1]} query heads and {key.shape[1]} key-value heads."
        )
    shows_weights = softmax is not None or return_weights or record is not None
    needs_weights = dropout is not None or shows_weights
    if kernel == "fused" and needs_weights:
        raise ValueError(
            "`kernel='fused'` never holds the weights: it has neither `dropout` nor `return_weights` nor `softmax`."
        )
    in_blocks = not shows_weights and (dropout is None or isinstance(dropout, keras.layers.Dropout))
    if kernel == "blockwise" and not in_blocks:
        raise ValueError(
            "`kernel='blockwise'` never holds all weights: it has neither `return_weights` nor `record` nor `softmax`, "
            "and `dropout` must be a `keras.layers.Dropout`."
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if padding is not None:
        padding = ops.convert_to_tensor(padding, dtype="bool")
    if mask is not None:
        mask = with_head_axis(ops.convert_to_tensor(mask, dtype="bool"))  # [B|1, H|1, T|1, S]
    told = causal, padding, sliding_window
    pays = in_blocks and kernel == "auto" and blockwise_pays(query, key, causal, sliding_window, dropout is not None)
    if kernel == "blockwise" or pays:
        drawn = (dropout.rate, dropout.seed_generator.next()) if dropout is not None and dropout.rate else None
        bias = None if bias is None else ops.convert_to_tensor(bias)
        return blockwise_attention(query, key, value, mask, bias, scale, *told, drawn)
    fused = kernel == "fused" or (
        kernel == "auto" and not needs_weights and _fused_is_faster() and not prefers_products(query)
    )
    if fused and mask is None and bias is None and sliding_window is None:

        def otherwise(query, key, value, padding):
            return _masked(query, key, value, _told(None, query, key, *told), None, scale)[0]

        output = flash_attention(query, key, value, causal, padding, scale, otherwise)
        if output is not None:
            return output
    mask = _told(mask, query, key, *told)
    if fused and (kernel == "fused" or not refuses_gradient(query, key, mask, bias)):
        return _fused(query, key, value, mask, bias, scale)
    wants_weights = return_weights or record is not None
    output, weights = _masked(query, key, value, mask, bias, scale, dropout, softmax, training, wants_weights)
    if record is not None:
        _record(record, query, key, value, mask, bias, scale, softmax, weights, output)
    return (output, weights) if return_weights else output


def _told(mask, query, key, causal, padding, window):
    """The mask and what causality, padding and a window say, as one: `[B|1, H|1, T|1, S]`, or None."""
    if not causal and padding is None and window is None:
        return mask
    positions = [ops.arange(ops.shape(x)[2], dtype="int32") for x in (query, key)]
    told = with_head_axis(make_attention_mask(*positions, causal, window, padding))
    return told if mask is None else ops.logical_and(mask, told)


def masked_softmax(scores, mask, training=False):
    """Softmax over the last axis of the scores that `mask` allows; uniform where it allows none."""
    if scores.shape[-1] == 1:  # Which a first token by itself has, and Keras would warn.
        return ops.ones_like(scores)
    scores = hide_masked(scores, mask)
    return trained_softmax(scores) if training else ops.softmax(scores, axis=-1)


def hide_masked(scores, mask):
    """Scores of float32 at least, so low where `mask` is False that a softmax gives them exactly 0."""
    return scores if mask is None else ops.where(mask, scores, ops.cast(-1e30, scores.dtype))


def _masked(query, key, value, mask, bias, scale, dropout=None, softmax=None, training=False, wants_weights=False):
    """The plain kernel, with 0 for what attends to no key, whose softmax is uniform; weights where they are wanted."""
    output, weights = _plain(query, key, value, mask, bias, scale, dropout, softmax, training, wants_weights)
    if mask is not None:
        attends = ops.any(mask, axis=-1, keepdims=True)
        output = ops.where(attends, output, ops.zeros_like(output))
        weights = ops.where(attends, weights, ops.zeros_like(weights)) if wants_weights else None
    return output, weights


def _plain(query, key, value, mask, bias, scale, dropout, softmax, training, wants_weights):
    batch, heads, length, _ = ops.shape(query)
    key_heads, key_length = key.shape[1], ops.shape(key)[2]
    score_dtype = keras.backend.result_type(query.dtype, "float32")
    # Heads that share a key lie next to each other: they become further rows of one matrix product.
    grouped = (batch, key_heads, heads // key_heads * length)
    query = ops.reshape(query * ops.convert_to_tensor(scale, query.dtype), (*grouped, query.shape[3]))
    if keras.backend.standardize_dtype(query.dtype) == "float16":  # Whose largest number is 65,504.
        query, key = ops.cast(query, score_dtype), ops.cast(key, score_dtype)
    multiply = trained_product if training else product
    if isinstance(grouped[2], int) and grouped[2] <= FEW and isinstance(batch, int) and batch == 1:
        # For one row XLA's CPU compiler writes out all keys transposed in the other product, and in this one the few
        # queries.
        scores = ops.transpose(ops.matmul(key, ops.transpose(query, (0, 1, 3, 2))), (0, 1, 3, 2))
    else:
        scores = multiply(query, key, y_transposed=True)
    scores = ops.cast(ops.reshape(scores, (batch, heads, length, key_length)), score_dtype)  # [B, H, T, S]
    if bias is not None:
        scores = scores + ops.cast(bias, score_dtype)
    alone = training and softmax is None and not wants_weights and scores.shape[-1] != 1
    if alone and sums_are_products() and _is_in_float32(scores, value) and _drops_some(dropout):
        drawn = () if dropout is None else (dropout.rate, dropout.seed_generator.next())
        weights, output = None, trained_attention(hide_masked(scores, mask), value, *drawn)
    else:
        softmax = softmax or functools.partial(masked_softmax, training=training)
        weights = ops.cast(softmax(scores, mask), value.dtype)
        dropped = weights if dropout is None else dropout(weights)
        output = multiply(ops.reshape(dropped, (*grouped, key_length)), value)
    return ops.reshape(output, (batch, heads, length, value.shape[3])), weights


def _is_in_float32(*tensors):
    return {keras.backend.standardize_dtype(x.dtype) for x in tensors} == {"float32"}


def _drops_some(dropout):
    """Whether dropout, if there is any, sets some elements to 0, each by itself."""
    usual = isinstance(dropout, keras.layers.Dropout)
    return dropout is None or (usual and 0 < dropout.rate < 1 and dropout.noise_shape is None)


def _record(record, query, key, value, mask, bias, scale, softmax, weights, output):
    """Hands on what the plain kernel went through, step by step as the paper writes it."""
    for name, given in (("mask", mask), ("bias", bias)):
        if given is not None:
            record(name, given)
    dtype = keras.backend.result_type(query.dtype, "float32")
    shared = ops.repeat(key, query.shape[1] // key.shape[1], axis=1)
    steps = [ops.matmul(ops.cast(query, dtype), ops.transpose(ops.cast(shared, dtype), (0, 1, 3, 2)))]
    record("scores", steps[-1], query, key)
    steps.append(steps[-1] * ops.convert_to_tensor(scale, dtype))
    record("scaled_scores", steps[-1], steps[-2])
    if bias is not None:
        steps.append(steps[-1] + ops.cast(bias, dtype))
        record("biased_scores", steps[-1], steps[-2], bias)
    masks = () if mask is None else (mask,)
    if mask is not None and softmax is None:
        steps.append(ops.where(mask, steps[-1], ops.cast(-float("inf"), dtype)))
        record("masked_scores", steps[-1], steps[-2], mask)
        masks = ()
    record("weights", weights, steps[-1], *masks)
    record("attended", output, weights, value)


def _fused(query, key, value, mask, bias, scale):
    """Keras' own kernel, with what it lacks: bias and mask together, one key-value head, rows without any key."""
    heads, key_heads = query.shape[1], key.shape[1]
    attends = None
    if mask is not None:
        attends = ops.any(mask, axis=-1, keepdims=True)  # [B|1, H|1, T|1, 1]
        # A row without any key attends to all of them here and is set to 0 below: no kernel sees an empty softmax.
        mask = ops.logical_or(mask, ops.logical_not(attends))
    dtype = value.dtype
    if keras.backend.standardize_dtype(dtype) == "float16":
        # Scores beyond its range defeat the mask in torch's kernel, and XLA's for CPUs has none that takes it.
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    if bias is not None and mask is not None:
        bias = ops.where(mask, ops.cast(bias, query.dtype), ops.cast(-1e30, query.dtype))
        mask = None
    full = (ops.shape(query)[0], heads, ops.shape(query)[2], ops.shape(key)[2])
    bias = None if bias is None else ops.broadcast_to(ops.cast(bias, query.dtype), full)
    mask = None if mask is None else ops.broadcast_to(mask, full)
    if key_heads != heads:
        key, value = (ops.repeat(x, heads // key_heads, axis=1) for x in (key, value))
    query, key, value = (ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
    # Keras would ask torch which kernel takes these, which torch cannot compile and chooses by itself as well.
    flash = False if keras.backend.backend() == "torch" else None
    output = ops.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale, flash_attention=flash)
    output = ops.cast(ops.transpose(output, (0, 2, 1, 3)), dtype)
    return output if attends is None else ops.where(attends, output, ops.zeros_like(output))


def _fused_is_faster():
    # TensorFlow has no fused kernel: Keras writes the same products out there, in a slower order.
    return keras.backend.backend() != "tensorflow"
