import keras
import numpy as np
import pytest
from harness import as_numpy, random

from keras_transformer.layers import FeedForward

X = random(2, 5, 8)


def affine(part, x):
    y = x @ as_numpy(part.kernel)
    return y if part.bias is None else y + as_numpy(part.bias)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", lambda x: np.maximum(x, 0)), ("silu", lambda x: x / (1 + np.exp(-x))), (None, lambda x: x)],
)
def test_equation_of_the_paper(activation, function, gated, use_bias):
    layer = FeedForward(16, activation, gated=gated, use_bias=use_bias)
    layer.build(X.shape)
    layer.set_weights([random(*w.shape, seed=i) for i, w in enumerate(layer.weights)])
    hidden = function(affine(layer.gate, X)) * affine(layer.up, X) if gated else function(affine(layer.up, X))
    np.testing.assert_allclose(as_numpy(layer(X)), affine(layer.down, hidden), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gated", "names"), [(False, ["up", "down"]), (True, ["up", "gate", "down"])])
def test_weights_are_named_after_their_projections(gated, names):
    layer = FeedForward(16, gated=gated, use_bias=False, name="feed_forward")
    layer.build(X.shape)
    assert [weight.path for weight in layer.weights] == [f"feed_forward/{name}/kernel" for name in names]


def test_positions_do_not_mix():
    layer = FeedForward(16)
    changed = X.copy()
    changed[:, 2] = 7
    same = [0, 1, 3, 4]
    np.testing.assert_allclose(as_numpy(layer(changed))[:, same], as_numpy(layer(X))[:, same], atol=1e-6)


def test_dropout_acts_on_the_hidden_layer():
    """With ones throughout, each output counts the hidden features that were kept."""
    layer = FeedForward(10, None, use_bias=False, dropout=0.5)
    x = np.ones((200, 1), "float32")
    layer.build(x.shape)
    layer.set_weights([np.ones((1, 10)), np.ones((10, 1))])
    kept = as_numpy(layer(x, training=True)) / 2
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert 4.5 < kept.mean() < 5.5 and kept.min() >= 0 and kept.max() <= 10
    np.testing.assert_allclose(as_numpy(layer(x)), 10, atol=1e-5)


def test_a_mask_passes_through():
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, FeedForward(8)(keras.layers.Embedding(5, 8, mask_zero=True)(inputs)))
    mask = as_numpy(keras.src.backend.get_keras_mask(model(np.array([[1, 2, 0]]))))
    assert mask.tolist() == [[True, True, False]]
