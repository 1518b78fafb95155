"""Packed rows: each text has the loss and the gradients that it has by itself, and no text sees another."""

import keras
import numpy as np
import pytest
from harness import as_numpy, gradients
from keras import ops

import keras_transformer as kt
from keras_transformer.layers.segments import SegmentMask

TEXTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
SOURCES = [[15, 16], [17, 18, 19, 20], [21], [22, 23, 24]]
SMALL = {"dim": 16, "num_heads": 2, "hidden_dim": 32, "depth": 1, "dropout": 0.0}
LANGUAGE_MODELS = {
    "rotary": {},
    "learned": {"position": "learned", "max_length": 6},  # Shorter than a row, not than a text.
    "sinusoidal": {"position": "sinusoidal"},
}


def rows(texts, starts, ends, length=9):
    """Two texts in a row: ids and segments `[2, length]`."""
    ids, segments = np.zeros((2, 2, length), "int32")
    for i, pair in enumerate((texts[:2], texts[2:])):
        row = [[*starts, *text, *ends] for text in pair]
        flat = [token for text in row for token in text]
        ids[i, : len(flat)] = flat
        segments[i, : len(flat)] = [k + 1 for k, text in enumerate(row) for _ in text]
    return ids, segments


def token_losses(logits, labels):
    return ops.categorical_crossentropy(ops.one_hot(labels, logits.shape[-1]), logits, from_logits=True)


def check(model, packed_inputs, alone, with_gradients=False):
    """Losses of all texts, and the gradient of their sum, against those of each text by itself."""
    packed = kt.models.packed(model)
    assert {id(weight) for weight in packed.weights} == {id(weight) for weight in model.weights}
    labels, segments = rows(TEXTS, [], [2])

    def losses():
        tokens = token_losses(packed(packed_inputs), labels)  # [2, T]
        return [
            ops.sum(ops.where(segments[row] == text, tokens[row], 0.0)) / (segments[row] == text).sum()
            for row in (0, 1)
            for text in (1, 2)
        ]

    def losses_alone():
        return [
            ops.mean(token_losses(model(inputs), np.array([[*text, 2]])))
            for inputs, text in zip(alone, TEXTS, strict=True)
        ]

    found, expected = ([float(loss) for loss in each()] for each in (losses, losses_alone))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if not with_gradients:
        return packed
    variables = model.trainable_variables
    found, expected = (gradients(lambda each=each: sum(each()), variables) for each in (losses, losses_alone))
    for variable, one, other in zip(variables, found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=variable.path)
    return packed


@pytest.mark.parametrize("options", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_a_text_in_a_row_has_the_loss_that_it_has_alone(options, tmp_path):
    model = kt.models.causal_lm(30, **SMALL, **options)
    ids, segments = rows(TEXTS, [1], [])
    inputs = {"token_ids": ids, "token_segments": segments}
    packed = check(model, inputs, [np.array([[1, *text]]) for text in TEXTS])
    if "max_length" not in options:
        return
    packed.save(tmp_path / "packed.keras")
    loaded = keras.models.load_model(tmp_path / "packed.keras")
    np.testing.assert_allclose(as_numpy(loaded(inputs)), as_numpy(packed(inputs)), atol=1e-6)


def test_a_pair_in_a_row_has_the_loss_and_the_gradients_that_it_has_alone():
    model = kt.models.transformer(30, 30, **SMALL, remat=True)
    (source, source_segments), (target, target_segments) = rows(SOURCES, [], [2]), rows(TEXTS, [1], [])
    inputs = {"source_ids": source, "source_segments": source_segments,
              "target_ids": target, "target_segments": target_segments}  # fmt: skip
    alone = [
        {"source_ids": np.array([[*source, 2]]), "target_ids": np.array([[1, *target]])}
        for source, target in zip(SOURCES, TEXTS, strict=True)
    ]
    check(model, inputs, alone, with_gradients=True)


def test_a_model_of_layers_by_hand_and_one_inside_another():
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(30, 16, mask_zero=True)(ids)
    inner = keras.Input((None, 16))
    inner = keras.Model(inner, kt.layers.EncoderBlock(2, 32)(inner), name="inner")
    everything = SegmentMask()(ops.ones_like(ids), ops.ones_like(ids))
    x = kt.layers.MultiHeadSelfAttention(2, causal=True)(inner(x), attention_mask=everything)
    model = keras.Model(ids, keras.layers.Dense(30)(x))
    ids, segments = rows(TEXTS, [1], [])
    check(model, {"token_ids": ids, "token_segments": segments}, [np.array([[1, *text]]) for text in TEXTS])


BAD_MODELS = {
    "images": (
        lambda: kt.models.image_captioner((8, 8, 1), 9, 4, dim=8, depth=1, num_heads=2, hidden_dim=8),
        r"whose inputs are of \('token_ids', .*received the inputs \['images', 'target_ids'\]",
    ),
    "no graph": (lambda: keras.layers.Dense(3), "received a model without a graph"),
    "one answer a text": (
        lambda: kt.models.text_classifier(9, 2, dim=8, depth=1, num_heads=2, hidden_dim=8),
        r"cannot read packed rows: `mean` \(GlobalAveragePooling1D\) reads several positions",
    ),
    "class token": (
        lambda: kt.models.text_classifier(9, 2, dim=8, depth=1, num_heads=2, hidden_dim=8, pooling="class_token"),
        "cannot read packed rows: `class_token`",
    ),
    "last token": (
        lambda: kt.models.text_classifier(9, 2, dim=8, depth=1, num_heads=2, hidden_dim=8, pooling="last_token"),
        r"an output for each token; received one of shape \(None, 2\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_cannot_read_packed_rows(make, message):
    with pytest.raises(ValueError, match=message):
        kt.models.packed(make())
