"""Rows of different lengths as batches of few sizes, so that little is compiled."""

import numpy as np
from keras import ops

from keras_transformer.ops.masks import get_mask, set_mask

PROMPT_BUCKET = 32
SOURCE_BUCKET = 16


def bucket(size, smallest, doubling_to=None):
    """The next size that is compiled for: `smallest` doubled as often as needed, from `doubling_to` on its multiples.

    A size of 1, the start token alone, stays 1.
    """
    if size <= 1:
        return 1
    if doubling_to is not None and size > doubling_to:
        return -(-size // doubling_to) * doubling_to
    while smallest < size:
        smallest *= 2
    return smallest


def bucket_tensor(size, smallest):
    """The next power of 2 times `smallest`, for a size that is a tensor."""
    sizes = ops.convert_to_tensor([smallest * 2**i for i in range(24)], "int32")
    return ops.min(ops.where(sizes >= ops.cast(size, "int32"), sizes, sizes[-1]))


def is_ragged(values):
    """Whether `values` is a list of rows, which may differ in length, rather than an array or tensor."""
    return isinstance(values, (list, tuple)) and all(isinstance(row, (list, tuple, np.ndarray)) for row in values)


def left_padded(rows, length, pad_id):
    """Rows of different lengths as an int32 array of `length` columns, padded on the left."""
    array = np.full((len(rows), length), pad_id, "int32")
    for row, values in zip(array, rows, strict=True):
        row[length - len(values) :] = values
    return array


def pad_rows(rows, pad_id):
    """Rows of different lengths as an int32 array, padded on the right."""
    array = np.full((len(rows), max(map(len, rows), default=1) or 1), pad_id, "int32")
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array


def real_span(row, pad_id):
    """Begin and end of what is left of a row without the padding on either side."""
    real = np.flatnonzero(np.asarray(row) != pad_id)
    return (real[0], real[-1] + 1) if len(real) else (0, 0)


def align_right(tokens, real, pad_id):
    """Rows of a tensor `[B, P]` with the padding of both sides moved to the left, and which of it is real."""
    length = ops.shape(tokens)[1]
    places = ops.arange(length, dtype="int32")
    last = ops.max(ops.where(real, places, -1), axis=-1, keepdims=True)
    first = ops.min(ops.where(real, places, length), axis=-1, keepdims=True)
    come_from = places - (length - 1 - last)
    real = ops.logical_and(come_from >= first, last >= 0)
    moved = ops.take_along_axis(tokens, ops.maximum(come_from, 0), axis=1)
    return ops.where(real, moved, ops.cast(pad_id, tokens.dtype)), real


def repeat_rows(x, times):
    """Each row `times` over, the mask along with it."""
    mask = get_mask(x)
    return set_mask(ops.repeat(x, times, axis=0), None if mask is None else ops.repeat(mask, times, axis=0))
