"""Dropout by cheap random bits: as often, as much and as much by chance as Keras' own, compiled and not."""

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, compiled, dtype_of, gradients, random
from keras import ops

import keras_transformer as kt
from keras_transformer.layers import Dropout

WAYS = {"eager": lambda function: function, "compiled": compiled}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def kept(layer, shape, way=WAYS["eager"]):
    """Where the layer keeps ones, boolean of `shape`."""
    ones = ops.ones(shape)
    return as_numpy(way(lambda: layer(ones, training=True))()) != 0


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9, 0.9999])
def test_it_drops_the_share_it_is_asked_to_and_scales_the_rest(way, rate):
    layer, x = Dropout(rate, seed=3), random(2**10, 2**9)
    y = as_numpy(way(lambda: layer(ops.convert_to_tensor(x), training=True))())
    share = (y == 0).mean()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / x.size) ** 0.5 + 2**-17  # 16 bits an element, where fewest.
    np.testing.assert_allclose(y[y != 0], x[y != 0] / (1 - rate), rtol=2**-17 / (1 - rate) + 1e-6)


def test_places_and_calls_are_independent(way):
    """Correlation of what is kept with what is at other places, in other calls and by other seeds."""
    layer, shape = Dropout(0.5, seed=0), (8, 64, 512)
    first, second = kept(layer, shape, way), kept(layer, shape, way)
    if BACKEND == "jax" and way is compiled:  # Where no call leaves a trace, both are the same.
        second = kept(layer, shape)
        layer = Dropout(0.5, seed=0)
    others = [second, kept(Dropout(0.5, seed=1), shape, way)]
    flat = first.ravel()
    others += [np.roll(flat, lag).reshape(shape) for lag in (1, 2, 3, 4, 7, 16, 64, 512, 2**15, 2**17)]
    signs = 2.0 * first - 1
    for i, other in enumerate(others):
        if i == 0 and BACKEND == "jax" and way is compiled:
            continue
        assert abs((signs * (2.0 * other - 1)).mean()) < 5 / first.size**0.5, i
    # Sets of places in which bits might repeat each other: parity of neighbours four by four.
    assert abs(np.prod(signs.reshape(-1, 4), axis=1).mean()) < 5 / (first.size / 4) ** 0.5
    for axis in range(3):  # No row, column or matrix gets more than its share.
        rest = tuple(i for i in range(3) if i != axis)
        means = signs.mean(rest)
        assert np.abs(means).max() < 5 * (shape[axis] / first.size) ** 0.5


def test_a_seed_says_what_is_dropped_and_nothing_is_without_training(way):
    x = ops.ones((4, 64))
    masks = [kept(Dropout(0.5, seed=seed), (4, 64), way) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    for layer, training in ((Dropout(0.5), False), (Dropout(0.0), True)):
        np.testing.assert_array_equal(as_numpy(layer(x, training=training)), 1)
    np.testing.assert_array_equal(as_numpy(Dropout(1.0)(x, training=True)), 0)


@pytest.mark.parametrize("rate", [1e-12, 1 - 1e-12])
def test_rates_next_to_none_and_all(way, rate):
    mask = kept(Dropout(rate, seed=0), (8, 8), way)
    assert mask.all() if rate < 0.5 else not mask.any()


def test_noise_of_a_smaller_shape_drops_whole_rows(way):
    mask = kept(Dropout(0.5, noise_shape=(None, 1, 1), seed=0), (256, 3, 4), way)
    assert (mask == mask[:, :1, :1]).all()
    assert 64 < mask[:, 0, 0].sum() < 192


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_bfloat16"])
def test_half_precision_stays(way, policy):
    layer = Dropout(0.5, seed=0, dtype=policy)
    y = way(lambda: layer(ops.ones((8, 8)), training=True))()
    assert dtype_of(y) == layer.compute_dtype
    assert set(np.unique(as_numpy(y))) == {0.0, 2.0}


def test_the_gradient_goes_where_the_value_went():
    x = keras.Variable(random(16, 32))
    values = as_numpy(Dropout(0.25, seed=5)(x.value, training=True))
    layer = Dropout(0.25, seed=5)
    (slopes,) = gradients(lambda: ops.sum(layer(ops.convert_to_tensor(x.value), training=True)), [x])
    np.testing.assert_allclose(slopes, values / as_numpy(x.value), rtol=1e-5)


def test_blocks_keep_the_paths_of_their_seeds():
    """Weight files know Keras' own dropout by these."""
    keras.utils.clear_session()
    block = kt.layers.EncoderBlock(kt.layers.MultiHeadSelfAttention(2, dropout=0.1), 8, dropout=0.1, name="block")
    block.build((1, 3, 4))
    paths = [v.path for v in block.non_trainable_variables]
    assert paths == [
        "block/self_attention/seed_generator/seed_generator_state",
        "block/seed_generator_1/seed_generator_state",
    ]


MODELS = {
    "causal_lm": lambda **sizes: kt.models.causal_lm(20, **sizes),
    "image_captioner": lambda **sizes: kt.models.image_captioner((8, 8, 1), 20, patch_size=4, **sizes),
    "speech_recognizer": lambda **sizes: kt.models.speech_recognizer(6, 20, **sizes),
    "text_classifier": lambda **sizes: kt.models.text_classifier(20, 3, **sizes),
    "transformer": lambda **sizes: kt.models.transformer(20, 20, **sizes),
    "vision_transformer": lambda **sizes: kt.models.vision_transformer((8, 8, 1), 3, patch_size=4, **sizes),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_no_other(name):
    """One layer of Keras' own after an embedding can take a quarter of a compiled step."""
    model = MODELS[name](dim=8, depth=1, num_heads=2, hidden_dim=8, dropout=0.1)
    found = [type(layer) for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dropout)]
    assert len(found) >= 3 and set(found) == {Dropout}


def test_a_saved_model_has_it_again(tmp_path):
    inputs = keras.Input((4, 3))
    layer = Dropout(0.25, noise_shape=(None, 1, None), seed=7, name="drop")
    keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").get_layer("drop")
    assert type(again) is Dropout and again.get_config() == layer.get_config()
