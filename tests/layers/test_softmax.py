"""Capped scores and sinks against attention written out in float64, in the attention function and in its layer."""

import keras
import numpy as np
import pytest
from harness import as_numpy, compiled, dtype_of, gradients, lengths, random
from keras import ops

from keras_transformer.layers import AttentionSinks, MultiHeadSelfAttention, SoftCap
from keras_transformer.ops import dot_product_attention
from keras_transformer.scopes import DecodingScope, RecordingScope

T, S, D = 5, 7, 4
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
MASK = np.random.default_rng(0).random((2, T, S)) < 0.6
MASK[0, 2] = False  # A row that may attend to nothing, beside a whole one of the batch.
MASK[1] = False
SINKS = np.array([0.5, -2.0, 3.0, 0.0], "float32")


def made(kind):
    if kind == "cap":
        return SoftCap(0.8)
    layer = AttentionSinks(4)
    layer.build((2, 4, T, S))
    layer.sinks.assign(SINKS)
    return layer


def weights_of(kind, scores, mask):
    """Weights of scores `[B, 4, T, S]`, key by key: 0 where the mask is False."""
    scores = 0.8 * np.tanh(scores / 0.8) if kind == "cap" else scores
    exponentials = np.where(mask, np.exp(scores), 0)
    total = exponentials.sum(-1, keepdims=True)
    total = total if kind == "cap" else total + np.exp(SINKS.astype("float64"))[:, None, None]
    return exponentials / np.where(total == 0, 1, total)


def drawn(dtype="float32", scale=1.0):
    shapes = (2, 4, T, D), (2, 2, S, D), (2, 2, S, D)
    return [ops.cast(random(*shape, seed=i, scale=scale), dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("kind", ["cap", "sinks"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_attention_function(kind, masked, with_bias, dtype):
    query, key, value = drawn(dtype)
    mask = MASK if masked else None
    bias = random(1, 4, T, S, seed=5) if with_bias else None
    q, k, v = (as_numpy(x).astype("float64") for x in (query, key, value))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = q @ k.transpose(0, 1, 3, 2) / 2 + (bias if with_bias else 0)
    expected = weights_of(kind, scores, True if mask is None else mask[:, None])
    output, weights = dot_product_attention(
        query, key, value, mask, bias, softmax=made(kind).to_weights, return_weights=True
    )
    assert dtype_of(output) == dtype_of(weights) == dtype
    np.testing.assert_allclose(as_numpy(weights), expected, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(as_numpy(output), expected @ v, atol=2 * TOLERANCE[dtype])
    if masked:
        assert not as_numpy(weights)[~np.broadcast_to(mask[:, None], expected.shape)].any()


@pytest.mark.parametrize("kind", ["cap", "sinks"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("jit", [False, True])
def test_rows_without_a_key_are_zero_with_finite_gradients(kind, dtype, scale, jit):
    layer = made(kind)
    variables = [keras.Variable(x, dtype=dtype) for x in drawn(dtype, scale)]

    def attend(*tensors):
        return dot_product_attention(*tensors, MASK, softmax=layer.to_weights)

    output = as_numpy((compiled(attend) if jit else attend)(*(ops.convert_to_tensor(v) for v in variables)))
    assert not output[1].any() and not output[0, :, 2].any() and output[0, :, 0].any()
    variables += layer.trainable_weights
    found = gradients(lambda: ops.mean(ops.square(attend(*(v + 0 for v in variables[:3])))), variables)
    assert all(np.isfinite(gradient).all() for gradient in found)
    assert scale > 1 or all(gradient.any() for gradient in found)
    assert not found[0][1].any() and not found[0][0, :, 2].any()


@pytest.mark.parametrize("kind", ["cap", "sinks"])
def test_a_single_key(kind):
    scores = ops.convert_to_tensor(random(2, 4, T, 1))
    mask = np.random.default_rng(1).random((2, 1, T, 1)) < 2
    expected = weights_of(kind, as_numpy(scores), mask)
    np.testing.assert_allclose(as_numpy(made(kind)(scores, mask=ops.convert_to_tensor(mask))), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["cap", "sinks"])
def test_the_gradient_is_the_slope(kind):
    layer = made(kind)
    scores = random(2, 4, T, S, seed=3)
    probe = ops.convert_to_tensor(random(2, 4, T, S, seed=4))
    mask = np.broadcast_to(MASK[:1, None], scores.shape)
    variable = keras.Variable(scores)
    gradient = gradients(lambda: ops.sum(layer.to_weights(variable + 0, mask) * probe), [variable])[0]
    direction = np.where(mask, random(2, 4, T, S, seed=5).astype("float64"), 0)
    both = [(weights_of(kind, scores + step * direction, mask) * as_numpy(probe)).sum() for step in (1e-5, -1e-5)]
    np.testing.assert_allclose((gradient * direction).sum(), (both[0] - both[1]) / 2e-5, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["cap", "sinks"])
def test_the_layer_of_attention(kind):
    """What is recorded of the layer is what its scores give."""
    x = random(2, T, 8)
    padding = lengths(T, 3, size=T)
    layer = MultiHeadSelfAttention(4, num_key_value_heads=2, causal=True, use_bias=False, softmax=made(kind))
    layer.build(x.shape)
    if kind == "sinks":
        layer.softmax.sinks.assign(SINKS)
        assert f"{layer.name}/softmax/sinks" in [weight.path for weight in layer.weights]
    with RecordingScope() as scope:
        layer(x, mask=ops.convert_to_tensor(padding))
    (weights,) = [as_numpy(value) for name, value in scope.records.items() if name.endswith("weights")]
    query = (x @ as_numpy(layer.query.kernel)).reshape(2, T, 4, 2).transpose(0, 2, 1, 3)
    key = (x @ as_numpy(layer.key.kernel)).reshape(2, T, 2, 2).transpose(0, 2, 1, 3).repeat(2, axis=1)
    mask = padding[:, None, None] & np.tril(np.ones((T, T), bool))
    expected = weights_of(kind, query.astype("float64") @ key.transpose(0, 1, 3, 2) / np.sqrt(2), mask)
    np.testing.assert_allclose(weights, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["cap", "sinks"])
def test_decoding_equals_the_whole(kind):
    x = random(2, T, 8)
    layer = MultiHeadSelfAttention(4, causal=True, sliding_window=3, softmax=made(kind))
    layer.build(x.shape)
    if kind == "sinks":
        layer.softmax.sinks.assign(SINKS)
    whole, cache = as_numpy(layer(x)), None
    for index in range(T):
        with DecodingScope(cache, index=index, max_length=None if cache else T) as scope:
            output = layer(x[:, index : index + 1])
        cache = scope.cache
        np.testing.assert_allclose(as_numpy(output), whole[:, index : index + 1], atol=1e-5)
