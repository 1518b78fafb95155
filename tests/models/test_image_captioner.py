"""A writer of captions: what it may see, files, generation, images of other sizes, and that it learns."""

import keras
import numpy as np
import pytest
from harness import as_numpy
from keras import ops

import keras_transformer as kt

SIZES = {"dim": 16, "depth": (2, 1), "num_heads": 2, "hidden_dim": 32}
TARGETS = np.array([[1, 5, 6, 0], [1, 7, 4, 8]], "int32")
STEMS = {"patches": {"patch_size": (4, 8)}, "convolutions": {"convolutions": 2}}


def pictures(height=8, width=16, rows=2):
    return np.random.default_rng(0).normal(size=(rows, height, width, 1)).astype("float32")


def logits_of(model, images, targets=TARGETS):
    return as_numpy(model({"images": ops.convert_to_tensor(images), "target_ids": ops.convert_to_tensor(targets)}))


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_what_is_seen_and_files(options, tmp_path):
    model = kt.models.image_captioner((8, 16, 1), 9, **SIZES, **options)
    logits = logits_of(model, pictures())
    assert logits.shape == (2, 4, 9)
    assert np.abs(logits - logits_of(model, pictures()[::-1])).max() > 1e-4
    future = np.where(np.arange(4) < 2, TARGETS, 3).astype("int32")
    np.testing.assert_array_equal(logits_of(model, pictures(), future)[:, :2], logits[:, :2])
    np.testing.assert_allclose(logits_of(model, pictures(), TARGETS[:, :3])[0], logits[0, :3], atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits_of(again, pictures()), logits, atol=1e-6)
    larger = kt.models.resize_positions(again, (16, 24))
    assert logits_of(larger, pictures(16, 24)).shape == (2, 4, 9)


def test_a_generator_writes_what_the_whole_model_would():
    model = kt.models.image_captioner((8, 16, 1), 9, **SIZES, patch_size=4)
    written = kt.generation.Generator(model, start_id=1).generate({"images": pictures()}, 4)
    for image, row in zip(pictures(), written, strict=True):
        tokens = [1]
        for _ in range(4):
            tokens.append(int(logits_of(model, image[None], np.array([tokens], "int32"))[0, -1].argmax()))
        assert row.tolist() == tokens[1:]


def test_it_learns_to_say_where_the_light_is():
    """Of four fields in a row, the numbers of those that are lit."""
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    is_lit = random.random((256, 4)) < 0.5
    images = random.normal(size=(256, 4, 16, 1)) * 0.1 + np.repeat(is_lit, 4, axis=1)[:, None, :, None]
    rows = [[1, *(3 + np.flatnonzero(row)), 2] for row in is_lit]
    ids = np.array([row + [0] * (6 - len(row)) for row in rows], "int32")
    sizes = {"dim": 32, "depth": 1, "num_heads": 2, "hidden_dim": 64}
    model = kt.models.image_captioner((4, 16, 1), 7, **sizes, patch_size=4, dropout=0.0)
    model.compile(keras.optimizers.Adam(5e-3), kt.training.SmoothedCrossEntropy(0.0))
    images = images.astype("float32")
    model.fit({"images": images, "target_ids": ids[:, :-1]}, ids[:, 1:], epochs=30, batch_size=32, verbose=0)
    written = kt.generation.Generator(model, start_id=1, end_id=2).generate({"images": images}, 5)
    assert np.mean((written == ids[:, 1:]).all(axis=1)) > 0.95


BAD_INPUT = {
    "neither": ({}, "Either `patch_size` or `convolutions` must be given"),
    "patches": ({"patch_size": 5}, "nearest sizes that would do: 5 or 10 high, 15 or 20 wide"),
    "depth": ({"patch_size": 4, "depth": (1, 0)}, r"`depth` must be .*received \(1, 0\)"),
    "three depths": ({"patch_size": 4, "depth": (1, 1, 1)}, r"received \(1, 1, 1\)"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.models.image_captioner((8, 16, 1), 9, **arguments)
