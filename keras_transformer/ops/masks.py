"""Attention masks, built from positions. Masks are boolean everywhere: True means "attend"."""

import keras
import numpy as np
from keras import ops

# The logit of all tokens but the blank in frames of padding. Half precision has it as well.
SURELY_NOT = -1e4


def make_attention_mask(query_positions, key_positions, causal=False, window=None, padding=None, prefix=None):
    """Combines causality, a sliding window, a prefix and padding into one boolean mask.

    Masks are made from positions, never from the shape of the scores, so a query that is shorter than the keys (one new
    token against a cache) sees exactly what it may see.

    Args:
        query_positions: int tensor of shape `[T]` or `[B, T]`.
        key_positions: int tensor of shape `[S]` or `[B, S]`.
        causal: boolean. Whether a query sees only keys at its own position or before.
        window: int or None. A query sees only keys less than `window` positions away; with `causal=True` these are the
            last `window` keys, itself included (Mistral's sliding window).
        padding: boolean tensor of shape `[B, S]`, True for real keys, or None.
        prefix: pair of boolean tensors of shapes `[B, T]` and `[B, S]`, True for the queries and the keys of a prefix:
            these see each other whatever causality and window say. None where there is no prefix.

    Returns:
        Boolean tensor that broadcasts to `[B, T, S]` (it is `[T, S]` when nothing depends on the row of the batch), or
        None if every query may see every key.

    Raises:
        ValueError: if `window` is not positive, or `padding` or `prefix` is not boolean.

    Example:

    >>> import keras_transformer as kt
    >>> mask = kt.ops.make_attention_mask([3], [0, 1, 2, 3, 4], causal=True, window=2)
    >>> keras.ops.convert_to_numpy(mask).tolist()
    [[False, False, True, True, False]]
    """
    mask = None
    if causal or window is not None:
        query_positions = ops.convert_to_tensor(query_positions, dtype="int32")
        key_positions = ops.convert_to_tensor(key_positions, dtype="int32")
        distance = ops.expand_dims(query_positions, -1) - ops.expand_dims(key_positions, -2)  # [(B,) T, S]
        if causal:
            mask = distance >= 0
        if window is not None:
            if window < 1:
                raise ValueError(f"`window` must be a positive number of positions; received window={window}.")
            near = distance < window if causal else ops.abs(distance) < window
            mask = near if mask is None else ops.logical_and(mask, near)
    if prefix is not None and mask is not None:
        queries, keys = (check_mask(part, "prefix") for part in prefix)
        both = ops.logical_and(ops.expand_dims(queries, -1), ops.expand_dims(keys, -2))  # [B, T, S]
        mask = ops.logical_or(mask, both)
    if padding is not None:
        padding = ops.expand_dims(check_mask(padding, "padding"), -2)  # [B, 1, S]
        mask = padding if mask is None else ops.logical_and(mask, padding)
    return mask


def check_mask(mask, name, shape=None, like=None):
    """Returns `mask` as a tensor after checking that it is boolean and has the right shape.

    Args:
        mask: tensor or array.
        name: str. What the caller knows the mask by, for the error.
        shape: tuple of the sizes the mask must have, None where any size is right. A size of 1 in the mask broadcasts
            along the batch.
        like: str. What the shape must match, for the error.

    Returns:
        The mask; what is not a tensor or array yet becomes a tensor.

    Raises:
        ValueError: if the mask is not boolean, or its shape is not `shape`.

    Example:

    >>> import keras_transformer as kt
    >>> kt.ops.check_mask([[1.0, 0.0]], "context_mask")
    Traceback (most recent call last):
    ...
    ValueError: `context_mask` must be boolean (True = attend); received dtype float32. ...
    """
    if not hasattr(mask, "dtype"):
        mask = ops.convert_to_tensor(mask)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype != "bool":
        raise ValueError(
            f"`{name}` must be boolean (True = attend); received dtype {dtype}. An additive mask goes in as "
            f"`attention_bias`; a mask of ones and zeros as `keras.ops.cast({name}, 'bool')`."
        )
    if shape is not None:
        matches = len(mask.shape) == len(shape) and all(
            size is None or wanted is None or size == wanted or (axis == 0 and size == 1)
            for axis, (size, wanted) in enumerate(zip(mask.shape, shape, strict=False))
        )
        if not matches:
            wanted = ", ".join("batch" if axis == 0 else str(size) for axis, size in enumerate(shape))
            received = ", ".join("batch" if size is None else str(size) for size in mask.shape)
            raise ValueError(f"`{name}` must have shape ({wanted}) to match {like}; received ({received}).")
    return mask


def segment_mask(query_segments, key_segments):
    """Which queries and keys belong to the same text, where several texts are packed into a row.

    Args:
        query_segments: int tensor of shape `[B, T]`, the number of each position's text.
        key_segments: int tensor of shape `[B, S]`.

    Returns:
        Boolean tensor of shape `[B, T, S]`, True within a text: along the diagonal, in blocks.

    Example:

    >>> import keras_transformer as kt
    >>> mask = kt.ops.masks.segment_mask([[1, 1, 2]], [[1, 2, 2]])
    >>> keras.ops.convert_to_numpy(mask)[0].tolist()
    [[True, False, False], [True, False, False], [False, True, True]]
    """
    query_segments, key_segments = (ops.convert_to_tensor(x) for x in (query_segments, key_segments))
    return ops.equal(ops.expand_dims(query_segments, -1), ops.expand_dims(key_segments, -2))


def segment_positions(segments):
    """Positions that begin anew at each text of a row.

    Args:
        segments: int tensor of shape `[B, T]`, the number of each position's text. The positions of a text are
            neighbours.

    Returns:
        int32 tensor of shape `[B, T]`.

    Example:

    >>> import keras_transformer as kt
    >>> keras.ops.convert_to_numpy(kt.ops.masks.segment_positions([[4, 4, 7, 7, 7, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    segments = ops.convert_to_tensor(segments)
    places = ops.arange(ops.shape(segments)[1], dtype="int32")
    earlier = ops.logical_and(segment_mask(segments, segments), ops.expand_dims(places, -1) > places)  # [B, T, T]
    return ops.sum(ops.cast(earlier, "int32"), axis=-1)


def first_real(mask):
    """Number of padded positions before the first real one, for each row.

    Args:
        mask: boolean tensor of shape `[B, T]`, True for real positions.

    Returns:
        int32 tensor of shape `[B, 1]`; `T` for a row without any real position.

    Example:

    >>> import keras_transformer as kt
    >>> mask = [[False, True, True], [True, True, False], [False, False, False]]
    >>> keras.ops.convert_to_numpy(kt.ops.first_real(mask)).tolist()
    [[1], [0], [3]]
    """
    seen = ops.cumsum(ops.cast(mask, "int32"), axis=-1)
    return ops.sum(ops.cast(seen == 0, "int32"), axis=-1, keepdims=True)


def get_mask(x):
    """The mask that Keras attached to a tensor, or None."""
    return keras.src.backend.get_keras_mask(x)


def set_mask(x, mask):
    """Attaches a mask to a tensor as Keras does, and returns the tensor; a mask of None changes nothing."""
    if mask is not None:
        keras.src.backend.set_keras_mask(x, mask)
    return x


def with_head_axis(mask):
    """A mask `[T, S]` or `[B|1, T|1, S]` with an axis of one for all heads; one that has it, as it is."""
    mask = ops.expand_dims(mask, 0) if len(mask.shape) == 2 else mask
    return ops.expand_dims(mask, 1) if len(mask.shape) == 3 else mask


def surely_blank(vocabulary_size, blank_id=0):
    """Logits of a frame of padding, which CTC is to read nothing from: float32 `[vocabulary_size]`."""
    return np.where(np.arange(vocabulary_size) == blank_id, 0.0, SURELY_NOT).astype("float32")
