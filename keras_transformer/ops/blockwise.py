"""Attention in blocks of queries: exact, with memory linear in the length, for backends without a kernel that has it.

A block of queries holds its scores against the keys that it can see, and no others: all of them, those up to its end
under causality, or those within reach of a window. The gradient computes the scores of a block again.
"""

import functools
from typing import NamedTuple

import keras
from keras import ops

from keras_transformer.ops.dropping import elements_kept
from keras_transformer.ops.looping import compiled_by_xla, on_cpu, walk, with_gradient
from keras_transformer.ops.masks import make_attention_mask, with_head_axis
from keras_transformer.ops.products import product

HIDDEN = -1e30  # What is added to a hidden score: a softmax gives it exactly 0.
CAUSAL_SEGMENTS = 8  # Blocks of a segment read the keys up to its end: of the hidden half, an eighth is computed.


MANY_SCORES = 2**27  # 512 MB of float32, for each of the copies that the plain kernel makes of them.


class Settings(NamedTuple):
    """What is known before any tensor is."""

    scale: float
    causal: bool
    window: int | None
    rate: float  # Of dropout.
    block: int  # Queries in a block.
    by_xla: bool  # Whether XLA compiles it: the gradient lays scores out by keys, which transposes less, and bits hash.


def blockwise_attention(
    query,
    key,
    value,
    mask=None,
    bias=None,
    scale=1.0,
    causal=False,
    padding=None,
    window=None,
    dropout=None,
    block=None,
):
    """Computes attention as `dot_product_attention` does, never holding more scores than those of a block of queries.

    Args:
        query: float tensor of shape `[B, H, T, D]`.
        key: float tensor of shape `[B, K, S, D]`, where `K` divides `H`.
        value: float tensor of shape `[B, K, S, E]`.
        mask: boolean tensor of shape `[B|1, H|1, T|1, S]`, or None.
        bias: float tensor of shape `[B|1, H|1, T, S]`, or None.
        scale: float. Factor of the scores.
        causal: boolean. Whether query t sees keys 0 to t alone.
        padding: boolean tensor of shape `[B|1, S]`, True for real keys, or None.
        window: int or None. Query t sees only keys less than so many positions away from t.
        dropout: pair of a rate and an int tensor `[2]`, the seed of what is dropped, or None.
        block: int. Queries in a block; by default `block_size`.

    Returns:
        Tensor of shape `[B, H, T, E]` in the dtype of `value`.

    References: [Self-attention does not need O(n^2) memory](https://arxiv.org/abs/2112.05682);
    [FlashAttention](https://arxiv.org/abs/2205.14135), equation 4, for the gradient.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.blockwise import blockwise_attention
    >>> x = keras.random.normal((1, 2, 100, 4))
    >>> tuple(blockwise_attention(x, x, x, causal=True, block=32).shape)
    (1, 2, 100, 4)
    """
    rate, seed = (0.0, None) if dropout is None else dropout
    block = block or block_size(query, key)
    settings = Settings(float(scale), causal, window, float(rate), block, compiled_by_xla())
    return _attention(settings)((query, key, value, bias), (mask, padding, seed))


def blockwise_pays(query, key, causal, window, drops):
    """Whether blocks are the better way: measured to be as fast at least, or held back by the memory of all scores.

    Args:
        query: tensor of shape `[B, H, T, D]`. Where `T` or `S` is not known, blocks are not chosen.
        key: tensor of shape `[B, K, S, D]`.
        causal: boolean. Of blocks, half is never computed.
        window: int or None. Of blocks, what it leaves is computed.
        drops: boolean. Whether weights are dropped: blocks draw what they drop once more for the gradient.

    Returns:
        boolean.
    """
    batch, heads, length, _ = query.shape
    key_length = key.shape[2]
    if length is None or key_length is None:
        return False
    backend = keras.backend.backend()
    if backend != "tensorflow" and not on_cpu(query):
        return False  # Kernels of GPUs hold no scores.
    narrow = window is not None and (4 if backend == "jax" else 16) * window <= key_length
    scores = (batch or 1) * heads * length * key_length
    if backend == "torch":  # Its kernel for CPUs holds no scores either, but it has neither windows nor dropout.
        return min(length, key_length) >= 1024 and narrow or (drops and scores >= MANY_SCORES)
    if min(length, key_length) >= 512 and (narrow or (causal and window is None)):
        return True
    return scores >= (MANY_SCORES if backend == "tensorflow" or drops else MANY_SCORES // 4)


def block_size(query, key, scores=2**24):
    """Queries in a block so that it has no more than about `scores` scores, but enough for fast products."""
    batch, heads, _, _ = query.shape
    columns = (batch or 8) * heads * (key.shape[2] or 2048)
    return max(64, min(512, scores // columns // 64 * 64))


@functools.lru_cache
def _attention(settings):
    return with_gradient(functools.partial(_forward, settings), functools.partial(_backward, settings))


def _forward(settings, tensors, others):
    query, key, value, bias = tensors
    batch, heads, length, _ = ops.shape(query)
    outputs, sums = [], []
    for segment in _segments(settings, length, ops.shape(key)[2]):

        def step(i, carried, segment=segment):
            block = _Block(settings, tensors, others, segment, i)
            output, log_sum = block.attend()
            return carried, ((output, log_sum) if settings.by_xla else (output,))

        dtypes = (_dtype(value), _score_dtype(query))[: 1 + settings.by_xla]
        _, kept = walk(segment.blocks, step, (), dtypes)
        for parts, found in zip((outputs, sums), kept, strict=False):
            parts.append(_joined(found))
    kept = (ops.concatenate(sums, axis=2),) if settings.by_xla else ()
    output = ops.reshape(ops.concatenate(outputs, axis=2), (batch, heads, length, value.shape[3]))
    return output, (output, *kept)


def _backward(settings, tensors, others, kept, gradient):
    query, key, value, bias = tensors
    output, *sums = kept
    dtype = _score_dtype(query)
    # What each query's scores have in common: [B, H, T, 1].
    shared = ops.sum(ops.cast(output, dtype) * ops.cast(gradient, dtype), axis=-1, keepdims=True)
    of_query, of_bias = [], []
    of_key, of_value = (ops.zeros(ops.shape(x), dtype) for x in (key, value))
    for segment in _segments(settings, ops.shape(query)[2], ops.shape(key)[2]):

        def step(i, carried, segment=segment):
            block = _Block(settings, tensors, others, segment, i)
            rows = [block.rows(x) for x in (gradient, shared, *sums)]
            query, key, value, bias = (block.by_keys if settings.by_xla else block.by_queries)(*rows)
            carried = tuple(block.add(total, part) for total, part in zip(carried, (key, value), strict=True))
            return carried, ((query,) if bias is None else (query, bias))

        # Only the keys that the segment can see change.
        seen = ops.shape(key)[2] if settings.window else segment.seen
        totals = tuple(x[:, :, :seen] for x in (of_key, of_value))
        dtypes = (dtype if _dtype(query) == "float16" else _dtype(query), dtype)[: 1 if bias is None else 2]
        totals, found = walk(segment.blocks, step, totals, dtypes)
        of_key, of_value = (
            ops.concatenate([part, total[:, :, seen:]], axis=2)
            for part, total in zip(totals, (of_key, of_value), strict=True)
        )
        for parts, part in zip((of_query, of_bias), found, strict=False):
            parts.append(_joined(part))
    found = [ops.concatenate(of_query, axis=2), of_key, of_value, ops.concatenate(of_bias, axis=2) if of_bias else None]
    return tuple(
        None if x is None else ops.reshape(ops.cast(part, x.dtype), ops.shape(x))
        for part, x in zip(found, tensors, strict=True)
    )


class _Segment(NamedTuple):
    """Blocks of one size that read as many keys. Numbers, or tensors where the length is not known yet."""

    first: int  # The first query.
    blocks: int
    size: int  # Queries in a block.
    seen: int  # Keys that a block reads.


def _segments(settings, length, key_length):
    """The queries in order, as segments of whole blocks and the rest behind them."""
    reach = 0 if settings.window is None else settings.window - 1
    size, parts = settings.block, CAUSAL_SEGMENTS if settings.causal and settings.window is None else 1
    if not isinstance(length, int):  # There is a whole block whatever the length: a loop keeps nothing of no steps.
        size, parts = ops.maximum(ops.minimum(length, size), 1), 1
    whole, rest = length // size, length % size
    bounds = [whole * i // parts for i in range(parts + 1)]
    pieces = [(low * size, high - low, size) for low, high in zip(bounds, bounds[1:], strict=False)]
    segments = []
    for first, blocks, queries in [*pieces, (whole * size, 1, rest)]:
        if settings.window is not None:
            seen = queries + reach * (1 if settings.causal else 2)
        else:
            seen = first + blocks * queries if settings.causal else key_length
        if not (_is_zero(blocks) or _is_zero(queries)):
            segments.append(_Segment(first, blocks, queries, _least(seen, key_length)))
    return segments


def _is_zero(number):
    return isinstance(number, int) and number == 0


def _least(one, other):
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else ops.minimum(one, other)


class _Block:
    """Block `i` of a segment: its queries, the keys that they can see, and their attention with its gradient."""

    def __init__(self, settings, tensors, others, segment, i):
        self.settings, self.size, self.seen = settings, segment.size, segment.seen
        query, key, value, self.all_bias = tensors
        self.all_mask, self.padding, self.seed = others
        self.heads, self.key_heads = query.shape[1], key.shape[1]
        self.start, self.low = segment.first + i * segment.size, 0
        if settings.window is not None:
            latest = ops.shape(key)[2] - self.seen
            self.low = self.start - (settings.window - 1)
            self.low = max(0, min(self.low, latest)) if isinstance(self.low, int) else ops.clip(self.low, 0, latest)
        self.query, self.key, self.value = self.rows(query), self.keys(key), self.keys(value)
        self.dtype, self.product_dtype = _score_dtype(query), query.dtype
        self.query = self.query * ops.convert_to_tensor(settings.scale, query.dtype)
        if _dtype(query) == "float16":  # Whose largest number is 65,504.
            self.product_dtype = self.dtype
            self.query, self.key = ops.cast(self.query, self.dtype), ops.cast(self.key, self.dtype)
        self.bias, self.attends = self._added()

    def rows(self, x):
        """The block's part of `[B, H, T, X]`, heads with the same keys as further rows: `[B, K, G * size, X]`."""
        x = _sliced(x, 2, self.start, self.size)
        return ops.reshape(x, (-1, self.key_heads, x.shape[1] // self.key_heads * self.size, x.shape[3]))

    def keys(self, x, axis=2):
        """The part of `[B, K, S, X]` that the block can see."""
        return _sliced(x, axis, self.low, self.seen)

    def add(self, total, part):
        """Adds what belongs to the keys of the block to all that a segment has."""
        part = ops.cast(part, total.dtype)
        if self.settings.window is None:
            return total + part
        return ops.slice_update(total, (0, 0, self.low, 0), self.keys(total) + part)

    def _added(self):
        """What is added to the scores, `[B|1, K|1, G|1, size|1, seen]`, and which queries attend to any key."""
        settings = self.settings
        positions = None, None
        if settings.causal or settings.window is not None:
            positions = [
                start + ops.arange(count, dtype="int32")
                for start, count in ((self.start, self.size), (self.low, self.seen))
            ]
        padding = None if self.padding is None else self.keys(self.padding, axis=1)
        mask = make_attention_mask(*positions, settings.causal, settings.window, padding)
        mask = None if mask is None else with_head_axis(mask)
        if self.all_mask is not None:
            explicit = self.keys(self.all_mask, axis=3)
            explicit = explicit if self.all_mask.shape[2] == 1 else _sliced(explicit, 2, self.start, self.size)
            mask = explicit if mask is None else ops.logical_and(mask, explicit)
        bias = attends = None
        if self.all_bias is not None:
            bias = _sliced(self.keys(self.all_bias, axis=3), 2, self.start, self.size)
            bias = self._of_groups(ops.cast(bias, self.dtype))
        if mask is not None:
            attends = ops.any(mask, axis=-1, keepdims=True)  # [B|1, H|1, size|1, 1]
            hidden = self._of_groups(ops.where(mask, ops.cast(0, self.dtype), ops.cast(HIDDEN, self.dtype)))
            bias = hidden if bias is None else bias + hidden
        return bias, attends

    def _of_groups(self, x):
        """`[B|1, H|1, ...]` to `[B|1, K|1, G|1, ...]`."""
        heads = (1, 1) if x.shape[1] == 1 else (self.key_heads, self.heads // self.key_heads)
        return ops.reshape(x, (ops.shape(x)[0], *heads, *ops.shape(x)[2:]))

    def _zero_where_nothing_is_seen(self, rows):
        """Rows `[B, K, G * size, X]`, those of queries without any key set to 0."""
        if self.attends is None:
            return rows
        rows = ops.reshape(rows, (-1, self.heads, self.size, rows.shape[3]))
        rows = ops.where(self.attends, rows, ops.zeros_like(rows))
        return ops.reshape(rows, (-1, self.key_heads, self.heads // self.key_heads * self.size, rows.shape[3]))

    def _with_groups(self, x):
        """`[B, K, G * size, seen]` to `[B, K, G, size, seen]`, in float32 at least."""
        groups = self.heads // self.key_heads
        return ops.cast(ops.reshape(x, (-1, self.key_heads, groups, self.size, self.seen)), self.dtype)

    def _scores(self):
        scores = self._with_groups(product(self.query, self.key, y_transposed=True))
        return scores if self.bias is None else scores + self.bias

    def _without_groups(self, x, dtype):
        return ops.reshape(
            ops.cast(x, dtype), (-1, self.key_heads, self.heads // self.key_heads * self.size, self.seen)
        )

    def _kept(self, scores):
        """What dropout multiplies the weights with, the same each time: 0 or `1 / (1 - rate)`; None without dropout."""
        if self.seed is None:
            return None
        # The seed is of this call; the block's own differs in the part that calls have in common.
        seed = self.seed + ops.cast([1, 0], self.seed.dtype) * ops.cast(1_000_003 * (self.start + 1), self.seed.dtype)
        keeps, rate = elements_kept(seed, ops.shape(scores), self.settings.rate, hashed=self.settings.by_xla)
        factor = 1 / (1 - rate) if rate < 1 else 0
        return ops.where(keeps, ops.cast(factor, scores.dtype), ops.cast(0, scores.dtype))

    def attend(self):
        """The block's output `[B, H, size, E]`, and the logarithm of the sum of its exponentials, of 1 for E."""
        scores = self._scores()
        weights, kept = ops.softmax(scores, axis=-1), self._kept(scores)
        weights = self._without_groups(weights if kept is None else weights * kept, self.value.dtype)
        output = self._zero_where_nothing_is_seen(product(weights, self.value))
        sums = ops.logsumexp(scores, axis=-1) if self.settings.by_xla else None
        return self._of_heads(output), None if sums is None else self._of_heads(ops.expand_dims(sums, -1))

    def _of_heads(self, x):
        return ops.reshape(x, (-1, self.heads, self.size, x.shape[-1]))

    def by_queries(self, gradient, shared):
        """Gradients of query rows, keys, values and bias, from that of the output and its product with the output."""
        gradient = self._zero_where_nothing_is_seen(gradient)
        scores = self._scores()
        weights, kept = ops.softmax(scores, axis=-1), self._kept(scores)
        dropped = self._without_groups(weights if kept is None else weights * kept, self.value.dtype)
        of_value = product(dropped, gradient, x_transposed=True)
        of_weights = self._with_groups(product(gradient, self.value, y_transposed=True))
        of_weights = of_weights if kept is None else of_weights * kept
        of_scores = weights * (of_weights - ops.reshape(shared, (*ops.shape(weights)[:-1], 1)))
        bias = self._of_bias(of_scores)
        of_scores = self._without_groups(of_scores, self.product_dtype)
        of_key = product(of_scores, self.query, x_transposed=True)
        return self._of_query(product(of_scores, self.key)), of_key, of_value, bias

    def by_keys(self, gradient, shared, sums):
        """The same with scores as `[B, K, seen, G * size]`, the weights from the sums of their exponentials."""
        gradient = self._zero_where_nothing_is_seen(gradient)
        groups = self.heads // self.key_heads
        shape = (-1, self.key_heads, self.seen, groups, self.size)

        def laid_out(x):  # [B, K, G, size, seen] to [B, K, seen, G, size]
            return ops.transpose(x, (0, 1, 4, 2, 3))

        def of_rows(x):  # [B, K, G * size, 1] to [B, K, 1, G, size]
            return ops.reshape(x, (-1, self.key_heads, 1, groups, self.size))

        scores = ops.cast(ops.reshape(product(self.key, self.query, y_transposed=True), shape), self.dtype)
        scores = scores if self.bias is None else scores + laid_out(self.bias)
        weights, kept = ops.exp(scores - of_rows(sums)), self._kept(ops.transpose(scores, (0, 1, 3, 4, 2)))
        kept = None if kept is None else laid_out(kept)
        flat = (-1, self.key_heads, self.seen, groups * self.size)
        dropped = ops.reshape(weights if kept is None else weights * kept, flat)
        of_value = product(ops.cast(dropped, self.value.dtype), gradient)
        of_weights = ops.cast(ops.reshape(product(self.value, gradient, y_transposed=True), shape), self.dtype)
        of_weights = of_weights if kept is None else of_weights * kept
        of_scores = weights * (of_weights - of_rows(shared))
        bias = None if self.all_bias is None else self._of_bias(ops.transpose(of_scores, (0, 1, 3, 4, 2)))
        of_scores = ops.cast(ops.reshape(of_scores, flat), self.product_dtype)
        of_key = product(of_scores, self.query)
        return self._of_query(product(of_scores, self.key, x_transposed=True)), of_key, of_value, bias

    def _of_query(self, x):
        return self._of_heads(x * ops.convert_to_tensor(self.settings.scale, x.dtype))

    def _of_bias(self, of_scores):
        """Gradient of the bias rows of the block, `[B|1, H|1, size, S]`."""
        if self.all_bias is None:
            return None
        of_scores = ops.reshape(of_scores, (-1, self.heads, self.size, self.seen))
        axes = tuple(axis for axis in (0, 1) if self.all_bias.shape[axis] == 1)
        of_scores = ops.sum(of_scores, axis=axes, keepdims=True) if axes else of_scores
        zeros = ops.zeros((*ops.shape(of_scores)[:3], ops.shape(self.all_bias)[3]), of_scores.dtype)
        return ops.slice_update(zeros, (0, 0, 0, self.low), of_scores)


def _sliced(x, axis, start, size):
    starts, sizes = [0] * len(x.shape), list(ops.shape(x))
    starts[axis], sizes[axis] = start, size
    return ops.slice(x, starts, sizes)


def _joined(blocks):
    """`[blocks, B, H, size, X]` to `[B, H, blocks * size, X]`."""
    count, batch, heads, size, width = ops.shape(blocks)
    if isinstance(count, int) and count == 1:
        return blocks[0]
    return ops.reshape(ops.transpose(blocks, (1, 2, 0, 3, 4)), (batch, heads, count * size, width))


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _score_dtype(x):
    return keras.backend.result_type(x.dtype, "float32")
