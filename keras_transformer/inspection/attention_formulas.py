"""The steps of attention in plain numpy."""

import math

import keras
import numpy as np

from keras_transformer import layers
from keras_transformer.inspection.arithmetic import Formula, affine_formula, array, norm_formula, softmax, split
from keras_transformer.layers.position import alibi_slopes


def _weights(layer):
    part = layer.softmax
    if part is None:
        return Formula("softmax(scores)", lambda _, scores: softmax(scores), "softmax")

    def masked(scores, mask):
        return scores if not mask else np.where(mask[0], scores, -np.inf)

    if isinstance(part, layers.SoftCap):
        text = "softmax(mask(cap · tanh(scores / cap)))"
        return Formula(text, lambda _, scores, *mask: softmax(masked(part.cap * np.tanh(scores / part.cap), mask)))
    if isinstance(part, layers.AttentionSinks):

        def with_sinks(_, scores, *mask):
            sinks = np.broadcast_to(array(part.sinks)[:, None, None], (*scores.shape[:-1], 1))
            weights = softmax(np.concatenate([masked(scores, mask), sinks], axis=-1))[..., :-1]
            return weights if not mask else np.where(mask[0].any(axis=-1, keepdims=True), weights, 0)

        return Formula("softmax(scores and sink), without the sink's share", with_sinks)
    return None


def _scores(layer, query, key):
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    return query @ key.transpose(0, 1, 3, 2)


def _attended(layer, weights, value):
    return weights @ np.repeat(value, weights.shape[1] // value.shape[1], axis=1)


def score_scale(layer):
    """What an attention layer multiplies its scores by."""
    return (layer.query.units // layer.num_heads) ** -0.5 if layer.scale is None else layer.scale


def _rotated(layer, x):
    rotary = layer.position
    dim = rotary.dim or x.shape[-1]
    frequencies, factor = rotary._frequencies(dim, x.shape[2])
    angles = np.arange(x.shape[2])[:, None] * np.asarray(keras.ops.convert_to_numpy(frequencies), "float64")
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    result = np.array(x)
    if rotary.interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result


def _bias(layer):
    if not isinstance(layer.position, layers.RelativePositionBias | layers.AlibiBias):
        return None

    def compute(_, key, *given):
        places = np.arange(key.shape[2])
        return _distance_bias(layer.position, places[:, None] - places) + sum(given)

    return Formula("a bias for each distance", compute)


def _distance_bias(position, distance):
    """`[1, heads, T, S]` for distances `[T, S]`, of which those to earlier keys are positive."""
    if isinstance(position, layers.AlibiBias):
        slopes = alibi_slopes(position.num_heads).astype("float32")
        return -np.abs(distance) * slopes[None, :, None, None]
    buckets, offset = position.num_buckets, 0
    if position.bidirectional:
        buckets //= 2
        offset = np.where(distance < 0, buckets, 0)
        distance = np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = buckets // 2
    ratio = np.maximum(distance, 1).astype("float32") / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(position.max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + growth.astype("int32"), buckets - 1)
    rows = array(position.bias_table)[offset + np.where(distance < exact, distance, far)]
    return rows.transpose(2, 0, 1)[None]


def _join(layer, x):
    batch, heads, length, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)


def _projected(name, heads):
    plain = affine_formula(name, lambda layer: getattr(layer, name), wrap="split({})")

    def found(layer):
        known = plain(layer)
        return Formula(known.text, lambda _, x: split(known.compute(layer, x), heads(layer)), "affine", known.dense)

    return found


def _normalized(name):
    return lambda layer: norm_formula(getattr(layer, name))


def _query_heads(layer):
    return layer.num_heads


def _key_heads(layer):
    return layer.num_key_value_heads or layer.num_heads


def mask_formula(layer, query, query_positions, key_positions, real, query_prefix, key_prefix, given):
    """The `Formula` of the mask that these make, each None where it has no part in it."""
    causal, window = getattr(layer, "causal", False), getattr(layer, "sliding_window", None)
    seen = "key position <= query position" if causal else ""
    if window is not None:
        seen = f"0 <= query - key position < {window}" if causal else f"|query - key position| < {window}"
    if seen and query_prefix is not None:
        seen = f"({seen} or both in the prefix)"
    parts = [seen, real is not None and "key is real", given is not None and "as the given mask says"]

    def compute(_, query, query_positions, key_positions, real, query_prefix, key_prefix, given):
        mask = np.ones((1, 1, 1), bool)
        if seen:  # One row for each query, one column for each key.
            behind = np.atleast_2d(query_positions)[:, :, None] - np.atleast_2d(key_positions)[:, None, :]
            least = 0 if causal else -np.inf if window is None else 1 - window
            most = np.inf if window is None else window - 1
            mask = (least <= behind) & (behind <= most)
            if query_prefix is not None:
                mask = mask | np.einsum("bt,bs->bts", query_prefix, key_prefix)
        for more in (None if real is None else real[:, None, :], given):
            mask = mask if more is None else mask & more
        return mask[:, None]  # For all heads.

    return Formula(" and ".join(part for part in parts if part), compute)


ATTENTION = {
    "query": _projected("query", _query_heads),
    "key": _projected("key", _key_heads),
    "value": _projected("value", _key_heads),
    "normalized_query": _normalized("query_norm"),
    "normalized_key": _normalized("key_norm"),
    "rotated_query": Formula("each pair of features turned by position · frequency", _rotated),
    "rotated_key": Formula("each pair of features turned by position · frequency", _rotated),
    "bias": _bias,
    "scores": Formula("query · keyᵀ", _scores),
    "scaled_scores": Formula("scores · scale", lambda layer, scores: scores * score_scale(layer), "scaled"),
    "biased_scores": Formula("scores + bias", lambda layer, scores, bias: scores + bias),
    "masked_scores": Formula(
        "scores where the mask is true, else -∞", lambda _, scores, mask: np.where(mask, scores, -np.inf)
    ),
    "weights": _weights,
    "attended": Formula("weights · value", _attended),
    "joined_heads": Formula("heads side by side", _join),
    "output": affine_formula("output", lambda layer: layer.output_projection, "joined"),
}
