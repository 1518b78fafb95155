"""A classifier of texts: what it pools, that padding changes nothing, and that it learns."""

import keras
import numpy as np
import pytest
from harness import as_numpy
from keras import ops

import keras_transformer as kt

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "hidden_dim": 32}
POOLINGS = ("mean", "class_token", "last_token")


def texts(rows=3, length=10):
    ids = np.random.default_rng(0).integers(1, 50, (rows, length)).astype("int32")
    ids[1, 6:] = 0
    return ids


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("max_length", [None, 16])
def test_padding_changes_nothing_and_a_file_holds_all_of_it(pooling, max_length, tmp_path):
    model = kt.models.text_classifier(50, 3, **SIZES, pooling=pooling, max_length=max_length)
    ids = texts()
    logits = as_numpy(model(ops.convert_to_tensor(ids)))
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(as_numpy(model(ops.convert_to_tensor(ids[1:2, :6])))[0], logits[1], atol=1e-5)
    left = np.pad(ids, ((0, 0), (4, 0)))
    np.testing.assert_allclose(as_numpy(model(ops.convert_to_tensor(left))), logits, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(as_numpy(again(ops.convert_to_tensor(ids))), logits, atol=1e-6)


def test_what_each_pooling_reads():
    """Of a bag of words, without blocks, each token moves the mean; of the others one place alone is read."""
    ids = texts()
    changed = ids.copy()
    changed[0, 3] = changed[0, 3] % 49 + 1
    for pooling, differs in (("mean", True), ("class_token", False), ("last_token", False)):
        model = kt.models.text_classifier(50, 3, **{**SIZES, "depth": 0}, pooling=pooling)
        before, after = (as_numpy(model(ops.convert_to_tensor(x))) for x in (ids, changed))
        assert bool(np.abs(after - before)[0].max() > 1e-4) is differs
        last = ids.copy()
        last[1, 5] = last[1, 5] % 49 + 1
        moved = np.abs(as_numpy(model(ops.convert_to_tensor(last))) - before).max(axis=-1) > 1e-5
        assert moved.tolist() == [False, pooling != "class_token", False]


def test_it_learns_which_word_comes_first():
    keras.utils.set_random_seed(1)
    ids = np.random.default_rng(0).integers(1, 20, (256, 8)).astype("int32")
    labels = (ids[:, 0] > 9).astype("int32")
    model = kt.models.text_classifier(20, 2, dim=32, depth=1, num_heads=2, hidden_dim=32, max_length=8, dropout=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(ids, labels, epochs=25, batch_size=64, verbose=0)
    assert model.evaluate(ids, labels, verbose=0)[1] > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, r"`pooling` must be one of \('mean', .*received pooling='max'"),
        ({"num_classes": 1}, "`num_classes` must be at least 2; received num_classes=1"),
        ({"depth": -1}, "`depth` must be a number of blocks, 0 or more; received depth=-1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.models.text_classifier(**{"vocabulary_size": 9, "num_classes": 2, **arguments})
