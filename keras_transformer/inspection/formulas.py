"""The steps of a trace, computed once more in plain numpy: each from what went in and the weights of its layer."""

import math

import keras
import numpy as np

from keras_transformer import layers
from keras_transformer.layers.position import alibi_slopes


class Formula:
    """How one kind of step is computed.

    Attributes:
        text: str. The formula, as people write it.
        compute: function `(layer, *sources)` of a layer and arrays to an array.
        kind: str. How the page puts numbers in: `"affine"`, `"scaled"`, `"softmax"`, `"sum"`, `"layer_norm"`,
            `"rms_norm"`, or None.
        dense: the `Dense` layer of an affine step, or None.
    """

    def __init__(self, text, compute, kind=None, dense=None):
        self.text = text
        self.compute = compute
        self.kind = kind
        self.dense = dense


def formula(layer, name):
    """The `Formula` of what `layer` records as `name`, or None where there is none."""
    if isinstance(layer, layers.EncoderBlock | layers.DecoderBlock):
        return _of_block(layer, name)
    for kind, formulas in FORMULAS.items():
        if isinstance(layer, kind) and name in formulas:
            found = formulas[name]
            return found(layer) if not isinstance(found, Formula) else found
    return None


def _array(weight):
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64")


def affine(layer, x):
    kernel = _array(layer.kernel)
    result = np.tensordot(x, kernel, 1)
    return result if getattr(layer, "bias", None) is None else result + _array(layer.bias)


def affine_formula(name, projection, read=None, wrap="{}"):
    """The `Formula` of a `Dense` layer inside of another, `projection(layer)`: `x · W + b`, or without `b`."""

    def found(layer):
        dense = projection(layer)
        end = f"_{name}" if name else ""
        text = f"{read or 'x'} · W{end}" + ("" if dense.bias is None else f" + b{end}")
        return Formula(wrap.format(text), lambda _, x: affine(dense, x), "affine", dense)

    return found


def split(x, heads):
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def softmax(scores):
    """Softmax over the last axis; a row of nothing but minus infinity becomes 0."""
    largest = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0, 1, total)


def normalized(layer, x):
    axes = tuple(layer.axis) if isinstance(layer.axis, list | tuple) else (layer.axis,)
    if isinstance(layer, keras.layers.RMSNormalization):
        result = x / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + layer.epsilon)
        return result * _array(layer.scale)
    centered = x - x.mean(axis=axes, keepdims=True)
    result = centered / np.sqrt(np.mean(centered * centered, axis=axes, keepdims=True) + layer.epsilon)
    result = result * _array(layer.gamma) if layer.gamma is not None else result
    return result + _array(layer.beta) if layer.beta is not None else result


def norm_formula(layer):
    if isinstance(layer, keras.layers.RMSNormalization):
        return Formula("x / sqrt(mean(x²) + ε) · scale", lambda _, x: normalized(layer, x), "rms_norm")
    if type(layer) is keras.layers.LayerNormalization:
        return Formula("(x - mean(x)) / sqrt(var(x) + ε) · γ + β", lambda _, x: normalized(layer, x), "layer_norm")
    return None


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=["float64"])(x / math.sqrt(2)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softmax": softmax,
}


def _activation(function):
    return ACTIVATIONS.get(getattr(function, "__name__", None))


def _hidden(layer):
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if isinstance(layer.activation, layers.ClampedSwiGLU):
        alpha, limit = layer.activation.alpha, layer.activation.limit

        def clamped(_, up, gate):
            gate = np.minimum(gate, limit)
            return (np.clip(up, -limit, limit) + 1) * gate * _sigmoid(alpha * gate)

        return Formula("(clip(up) + 1) · min(gate) · sigmoid(α · min(gate))", clamped)
    function = _activation(layer.activation)
    if function is None:
        return None
    if layer.gated:
        return Formula(f"{name}(gate) · up", lambda _, up, gate: function(gate) * up)
    return Formula(f"{name}(up)", lambda _, up: function(up))


def _of_block(layer, name):
    if name.endswith("_residual"):
        return Formula("x + y", lambda _, x, y: x + y, "sum")
    if name.endswith("_scaled"):
        return Formula("y · layer scale", lambda _, y: y * _array(getattr(layer, name.removesuffix("d"))))
    if name.endswith("_norm"):
        return norm_formula(getattr(layer, name))
    return None


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
            sinks = np.broadcast_to(_array(part.sinks)[:, None, None], (*scores.shape[:-1], 1))
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
    rows = _array(position.bias_table)[offset + np.where(distance < exact, distance, far)]
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


def _sinusoids(positions, dim, interleaved):
    angles = positions[..., None] * 10000.0 ** -(np.arange(0, dim, 2) / dim)
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1 if interleaved else -2)
    return waves.reshape(*positions.shape, -1)[..., :dim]


def _dense(layer):
    function = _activation(layer.activation)
    if function is None:
        return None
    name = layer.activation.__name__
    if name == "linear":
        return affine_formula("", lambda dense: dense)(layer)
    inner = affine_formula("", lambda dense: dense, wrap=name + "({})")(layer)
    return Formula(inner.text, lambda dense, x: function(inner.compute(dense, x)))


def _patches(layer, images):
    height, width = layer.patch_size
    batch, rows, columns, channels = images.shape
    cut = images.reshape(batch, rows // height, height, columns // width, width, channels)
    cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, height * width * channels)
    result = cut @ _array(layer.projection.kernel).reshape(-1, layer.dim)
    return result if layer.projection.bias is None else result + _array(layer.projection.bias)


def _with_prefix(layer, x):
    tokens = np.broadcast_to(_array(layer.tokens), (len(x), layer.count, x.shape[-1]))
    return np.concatenate([tokens, x], axis=1)


def _experts(layer):
    def compute(_, x, weights, chosen):
        tokens = x.reshape(-1, x.shape[-1])
        parts = [None if part is None else _array(part) for part in layer._kernels_and_biases()]
        up, up_bias, gate, gate_bias, down, down_bias = parts
        hidden = _hidden(layer)
        result = np.zeros_like(tokens)
        for row, (token, shares, experts) in enumerate(zip(tokens, weights, chosen, strict=True)):
            for share, expert in zip(shares, experts, strict=True):
                inner = [token @ up[expert] + (0 if up_bias is None else up_bias[expert])]
                if gate is not None:
                    inner.append(token @ gate[expert] + (0 if gate_bias is None else gate_bias[expert]))
                out = hidden.compute(layer, *inner) @ down[expert]
                result[row] += share * (out + (0 if down_bias is None else down_bias[expert]))
        return result.reshape(x.shape)

    return None if _hidden(layer) is None else Formula("Σ weight · expert(x)", compute)


def _best(layer, scores):
    return np.argsort(-scores, axis=-1, kind="stable")[:, : layer.top_k]


def _shares(layer, scores, chosen):
    return softmax(np.take_along_axis(scores, chosen, axis=-1))


def _router(layer, x):
    return affine(layer.router, x.reshape(-1, x.shape[-1]))


def _encoded(layer):
    if layer.kind == "learned":
        return Formula(
            "row of the table for the position",
            lambda _, positions, x: _array(layer.position_table)[positions + layer.offset],
        )
    return Formula(
        "sine and cosine of position · frequency",
        lambda _, positions, x: _sinusoids(positions + layer.offset, x.shape[-1], layer.interleaved),
    )


def _reversible(layer):
    """An embedding one way; the other way round, which floats take, the scores of its rows."""

    def compute(_, x):
        table = _array(layer.embeddings)
        if x.dtype.kind != "f":
            return table[x]
        scores = x @ (table.T if layer.tie_weights else _array(layer.reverse_embeddings))
        cap = getattr(layer, "logit_soft_cap", None)
        return scores if cap is None else cap * np.tanh(scores / cap)

    return Formula("row of the table, or x · tableᵀ", compute)


def _output(text, compute):
    return {"output": Formula(text, compute)}


SAME = _output("x, as it is outside of training", lambda _, x: x)
FORMULAS = {
    layers.MultiHeadSelfAttention: ATTENTION,
    layers.CrossAttention: ATTENTION,
    layers.FeedForward: {
        "up": affine_formula("up", lambda layer: layer.up),
        "gate": affine_formula("gate", lambda layer: layer.gate),
        "hidden": _hidden,
        "output": affine_formula("down", lambda layer: layer.down, "hidden"),
    },
    layers.MixtureOfExperts: {
        "router_scores": Formula("x · W_router", _router),
        "chosen_experts": Formula("the experts with the highest scores", _best),
        "expert_weights": Formula("softmax(scores of the chosen experts)", _shares),
        "output": _experts,
    },
    layers.PositionalEmbedding: {
        "encoded": _encoded,
        "scaled": Formula("x · scale", lambda layer, x: x * layer.scale),
        "output": Formula("x + position", lambda _, x, encoded: x + encoded, "sum"),
    },
    layers.PatchEmbedding: _output("patches · W + b", _patches),
    layers.PrefixTokens: _output("learned tokens in front of x", _with_prefix),
    keras.layers.ReversibleEmbedding: {"output": _reversible},
    keras.layers.Embedding: _output("row of the table", lambda layer, ids: _array(layer.embeddings)[ids]),
    keras.layers.Dense: {"output": _dense},
    keras.layers.LayerNormalization: {"output": norm_formula},
    keras.layers.RMSNormalization: {"output": norm_formula},
    keras.layers.Add: _output("sum", lambda _, *given: sum(given)),
    keras.layers.Dropout: SAME,
    keras.layers.SpatialDropout1D: SAME,
    keras.layers.GaussianNoise: SAME,
    keras.layers.Identity: SAME,
}
