"""Quantized models answer nearly the same, are saved as they are, and generate."""

import gc

import keras
import numpy as np
import pytest

import keras_transformer as kt
from keras_transformer.training import gptq_config

SIZES = {"dim": 8, "depth": 1, "num_heads": 2, "hidden_dim": 12}
MODELS = {
    "text_classifier": lambda: kt.models.text_classifier(30, 3, **SIZES),
    "causal_lm": lambda: kt.models.causal_lm(30, tied_output=False, gated=True, **SIZES),
    "transformer": lambda: kt.models.transformer(30, 30, **SIZES),
    "image_captioner": lambda: kt.models.image_captioner((8, 8, 3), 30, patch_size=4, **SIZES),
    "speech_recognizer": lambda: kt.models.speech_recognizer(30, 6, **SIZES),
}
CASES = [
    *[(name, "int8") for name in MODELS],
    ("transformer", "int4"),
    ("text_classifier", "gptq"),
    ("transformer", "gptq"),
]


@pytest.fixture(autouse=True)
def nothing_to_search():
    """Keras collects garbage for each layer that it quantizes, and would search all that is imported."""
    gc.freeze()


def feed_of(model, rows=6, length=7):
    random, feed = np.random.default_rng(0), {}
    for x in model.inputs:
        shape = [rows, *(length if size is None else size for size in x.shape[1:])]
        feed[x.name] = random.integers(1, 30, shape) if x.dtype == "int32" else random.normal(size=shape)
    return feed if len(feed) > 1 else next(iter(feed.values()))


def outputs_of(model, feed):
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(feed))]


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("name, mode", CASES)
def test_a_quantized_model_is_reloaded(name, mode, tmp_path):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    feed = feed_of(model)
    before = outputs_of(model, feed)
    model.quantize(mode, **({"config": gptq_config(model, feed)} if mode == "gptq" else {}))
    dense = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    assert {layer.quantization_mode for layer in dense} == {mode}
    after = outputs_of(model, feed)
    for one, other in zip(before, after, strict=True):
        assert 0.9 < np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other) < 1 - 1e-9
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(after, outputs_of(reloaded, feed), strict=True):
        np.testing.assert_array_equal(one, other)
    if name == "transformer":
        found = [
            kt.generation.Generator(x, start_id=1, jit_compile=False).generate({"source_ids": feed["source_ids"]}, 4)
            for x in (model, reloaded)
        ]
        np.testing.assert_array_equal(*found)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_how_projections_were_quantized_is_kept(tmp_path):
    model = MODELS["text_classifier"]()
    feed = feed_of(model)
    weights_alone = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    model.quantize(config=weights_alone)
    after = outputs_of(model, feed)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs_of(keras.saving.load_model(tmp_path / "model.keras"), feed), after)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_does_not_see_padding(mode):
    model = MODELS["transformer"]()
    model.quantize(mode)
    assert {model.get_layer(f"{side}_embedding").quantization_mode for side in ("source", "target")} == {mode}
    target = np.array([[1, 8, 9]])
    short, padded = ({"source_ids": np.array([ids]), "target_ids": target} for ids in ([5, 6, 7], [5, 6, 7, 0, 0, 0]))
    for one, other in zip(outputs_of(model, short), outputs_of(model, padded), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_calibration_needs_rows_and_a_functional_model():
    model = MODELS["text_classifier"]()
    with pytest.raises(ValueError, match="`inputs` must have rows to calibrate with; received none"):
        gptq_config(model, np.zeros((0, 4), "int32"))
    with pytest.raises(ValueError, match="`model` must be a functional keras.Model"):
        gptq_config(keras.layers.Dense(3), np.zeros((2, 4)))
