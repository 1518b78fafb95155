"""The attention layers against attention written out from their own weights."""

import keras
import numpy as np
import pytest
from harness import as_numpy, lengths, random
from keras import ops

from keras_transformer.layers import AlibiBias, CrossAttention, MultiHeadSelfAttention, RelativePositionBias
from keras_transformer.layers.checks import check_width

X, CONTEXT = random(2, 5, 8), random(2, 7, 12, seed=1)
MASK, CONTEXT_MASK = np.flip(lengths(5, 3, size=5), axis=-1).copy(), lengths(7, 4, size=7)


def written_out(layer, x, source, mask, bias=0.0):
    """Equation 1 and the heads of the paper, head by head, from the kernels and biases of `layer`."""

    def project(part, x):
        y = x.astype("float64") @ as_numpy(part.kernel)
        return y if part.bias is None else y + as_numpy(part.bias)

    query, key, value = project(layer.query, x), project(layer.key, source), project(layer.value, source)
    heads, key_heads = layer.num_heads, layer.num_key_value_heads or layer.num_heads
    width = query.shape[-1] // heads
    scale = width**-0.5 if layer.scale is None else layer.scale
    contexts = []
    for h in range(heads):
        shared = h // (heads // key_heads)
        q, k, v = (y[..., i * width : (i + 1) * width] for y, i in ((query, h), (key, shared), (value, shared)))
        scores = scale * q @ k.transpose(0, 2, 1) + (bias if np.ndim(bias) == 0 else bias[:, h])
        exponentials = np.where(mask, np.exp(scores), 0)
        total = exponentials.sum(-1, keepdims=True)
        contexts.append(exponentials / np.where(total == 0, 1, total) @ v)
    return project(layer.output_projection, np.concatenate(contexts, axis=-1))


def biased(layer):
    """Draws the biases too, which start at 0."""
    for i, weight in enumerate(layer.weights):
        if weight.path.endswith("bias"):
            weight.assign(random(*weight.shape, seed=50 + i))


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 2},
        {"num_heads": 4, "num_key_value_heads": 2, "causal": True},
        {"num_heads": 4, "num_key_value_heads": 1, "sliding_window": 2},
        {"num_heads": 2, "causal": True, "sliding_window": 3, "scale": 0.7},
        {"num_heads": 3, "head_dim": 5, "use_bias": ["query", "key", "value"]},
        {"num_heads": 2, "use_bias": False, "position": AlibiBias(2), "causal": True},
        {"num_heads": 2, "position": RelativePositionBias(2, 8, 16), "causal": True, "scale": 1.0},
    ],
    ids=str,
)
def test_self_attention(config):
    layer = MultiHeadSelfAttention(**config)
    layer.build(X.shape)
    biased(layer)
    distance = np.arange(5)[:, None] - np.arange(5)
    mask = np.broadcast_to(MASK[:, None], (2, 5, 5)).copy()
    if layer.causal:
        mask &= distance >= 0
    if layer.sliding_window:
        mask &= np.abs(distance) < layer.sliding_window
    bias = 0.0 if layer.position is None else as_numpy(layer.position(X))
    output = layer(X, mask=ops.convert_to_tensor(MASK))
    np.testing.assert_allclose(as_numpy(output), written_out(layer, X, X, mask, bias), atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 2},
        {"num_heads": 4, "num_key_value_heads": 2, "use_bias": ["query", "value", "output"]},
        {"num_heads": 4, "num_key_value_heads": 1, "scale": 0.3},
        {"num_heads": 3, "head_dim": 4, "use_bias": False},
    ],
    ids=str,
)
def test_cross_attention(config):
    layer = CrossAttention(**config)
    layer.build(X.shape, CONTEXT.shape)
    biased(layer)
    pairwise = np.random.default_rng(0).random((2, 5, 7)) < 0.7
    output = layer(X, CONTEXT, context_mask=CONTEXT_MASK, attention_mask=pairwise)
    expected = written_out(layer, X, CONTEXT, pairwise & CONTEXT_MASK[:, None])
    np.testing.assert_allclose(as_numpy(output), expected, atol=2e-5)


@pytest.mark.parametrize("norm", [keras.layers.RMSNormalization(epsilon=1e-5), keras.layers.LayerNormalization()])
def test_queries_and_keys_are_normalized_head_by_head(norm):
    """With the lengths of queries and keys gone, a longer input has the same weights and a longer output."""
    layer = MultiHeadSelfAttention(2, use_bias=False, query_key_norm=norm)
    layer.build(X.shape)
    of_norms = [weight for weight in layer.weights if "_norm/" in weight.path]
    assert len(of_norms) == 2 * len(layer.query_norm.weights) > 0
    assert all(tuple(weight.shape) == (4,) for weight in of_norms)  # One for all heads.
    np.testing.assert_allclose(as_numpy(layer(1000 * X)) / 1000, as_numpy(layer(100 * X)) / 100, atol=1e-3)
    plain = MultiHeadSelfAttention(2, use_bias=False)
    assert not np.allclose(as_numpy(plain(10 * X)) / 10, as_numpy(plain(X)), atol=1e-3)


@pytest.mark.parametrize("layer_class", [MultiHeadSelfAttention, CrossAttention])
@pytest.mark.parametrize(
    ("use_bias", "expected"),
    [
        (True, {"query", "key", "value", "output"}),
        (False, set()),
        (["query", "key", "value"], {"query", "key", "value"}),  # Qwen2
        (("value", "output", "query"), {"query", "value", "output"}),  # Whisper
    ],
)
def test_biases_by_projection(layer_class, use_bias, expected):
    layer = layer_class(2, use_bias=use_bias)
    layer.build(*([X.shape] if layer_class is MultiHeadSelfAttention else [X.shape, CONTEXT.shape]))
    assert {weight.path.split("/")[-2] for weight in layer.weights if weight.path.endswith("/bias")} == expected


def test_weights_are_named_after_their_projections():
    layer = MultiHeadSelfAttention(
        2, query_key_norm=keras.layers.RMSNormalization(), position=RelativePositionBias(2), name="attention"
    )
    layer.build(X.shape)
    parts = [f"{name}/{kind}" for name in ("query", "key", "value", "output") for kind in ("kernel", "bias")]
    parts += ["query_norm/scale", "key_norm/scale", "position/bias_table"]
    assert sorted(weight.path for weight in layer.weights) == sorted(f"attention/{part}" for part in parts)


@pytest.mark.parametrize("seeded", [False, True])
def test_projections_start_different(seeded):
    if seeded:
        keras.utils.set_random_seed(3)
    layer = MultiHeadSelfAttention(2)
    layer.build(X.shape)
    kernels = [as_numpy(part.kernel) for part in (layer.query, layer.key, layer.value, layer.output_projection)]
    for i, kernel in enumerate(kernels):
        assert not any(np.array_equal(kernel, other) for other in kernels[:i])


def test_the_same_seed_gives_the_same_layer():
    weights = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        layer = MultiHeadSelfAttention(2)
        layer.build(X.shape)
        weights.append(layer.get_weights())
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


def test_dropout_drops_weights_at_its_rate():
    """Values of 1 make of each output the sum of the weights that were kept: 1 on average."""
    layer = MultiHeadSelfAttention(1, use_bias=False, dropout=0.4)
    x = np.ones((4, 50, 1), "float32")
    layer.build(x.shape)
    layer.set_weights([np.zeros((1, 1)), np.zeros((1, 1)), np.ones((1, 1)), np.ones((1, 1))])
    sums = as_numpy(layer(x, training=True))
    assert abs(sums.mean() - 1) < 0.02
    np.testing.assert_allclose(sums * 50 * 0.6, np.round(sums * 50 * 0.6), atol=1e-3)
    np.testing.assert_allclose(as_numpy(layer(x)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "heads", "named"), [(100, 8, "96 and 104"), (8, 3, "6 and 9"), (4, 6, "divides: 6"), (10, 4, "8 and 12")]
)
def test_nearest_widths(dim, heads, named):
    with pytest.raises(ValueError, match=f"num_heads={heads} for a width of {dim}.*{named}"):
        check_width(dim, heads)
    assert check_width(heads * 7, heads) == 7
