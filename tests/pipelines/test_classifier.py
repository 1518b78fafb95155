"""Classifiers of raw inputs: one answer, however they are batched, saved and exported; and pipelines from images."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_transformer as kt
from keras_transformer.generation import Generator
from keras_transformer.pipelines import (
    Classifier,
    ImagePreprocessor,
    ImageReader,
    Pipeline,
    TokenReader,
    load,
    train_word_piece,
)

TEXTS = ["the cat sat on the mat", "der hund lief nach haus", "cat", "der der der hund", "the mat and the house"]
LABELS = ["English", "Deutsch"]
SIZES = [(8, 8), (11, 17), (30, 20)]


def image_model(outputs, **inputs):
    images = keras.Input((8, 8, 3), name="images")
    x = kt.layers.EncoderBlock(2, 16)(kt.layers.PatchEmbedding(4, 8)(images))
    return keras.Model([images, *inputs.values()], outputs(x, *inputs.values()))


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_piece(TEXTS, 60)


@pytest.fixture(scope="module")
def texts(tokenizer):
    model = kt.models.text_classifier(tokenizer.vocabulary_size(), 2, dim=8, depth=1, num_heads=2, hidden_dim=16)
    return Classifier(model, TokenReader(tokenizer, max_length=5, keep="last"), LABELS)


@pytest.fixture(scope="module")
def images():
    model = image_model(lambda x: keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    reader = ImageReader(ImagePreprocessor(size=(8, 8), mean=(0.4, 0.5, 0.6), std=0.3), (8, 8, 3))
    return Classifier(model, reader, ["a", "b", "c"])


def pictures(size=None):
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (*(size or shape), 3), "uint8") for shape in SIZES]


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_saved_is_loaded_elsewhere(kind, request, tmp_path):
    classifier = request.getfixturevalue(kind)
    raw = TEXTS if kind == "texts" else pictures()
    expected = classifier.probabilities(raw)
    np.testing.assert_allclose(expected.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(classifier.probabilities(raw, batch_size=1), expected, atol=1e-5)
    assert classifier.predict(raw) == [classifier.labels[i] for i in expected.argmax(axis=-1)]
    classifier.save(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded = load(tmp_path / "moved")
    assert loaded.labels == classifier.labels
    np.testing.assert_allclose(loaded.probabilities(raw), expected, atol=1e-6)
    loaded.save(tmp_path / "moved")  # An earlier one is replaced.
    (tmp_path / "moved" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        loaded.save(tmp_path / "moved")


def test_texts_are_cut_as_asked(texts, tokenizer):
    (ids,) = kt.pipelines.token_ids(tokenizer, TEXTS[:1])
    assert len(ids) > 5
    assert texts.source.rows([TEXTS[0]]) == [ids[-5:]]
    assert TokenReader(tokenizer, max_length=5).rows([TEXTS[0]]) == [ids[:5]]
    assert TokenReader(tokenizer).rows([TEXTS[0], "cat"])[0] == ids


SERVE = """
import sys, numpy as np, tensorflow as tf, tensorflow_text
classify = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answer = classify(text=tf.constant(sys.argv[2:]))
assert "keras_transformer" not in sys.modules
print([label.decode() for label in answer["label"].numpy()])
"""


def test_exported_texts_need_no_keras(texts, tmp_path):
    texts.export(tmp_path / "saved_model")
    command = [sys.executable, "-c", SERVE, tmp_path / "saved_model", *TEXTS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(texts.predict(TEXTS))


def test_exported_images(images, tmp_path):
    images.export(tmp_path / "saved_model")
    classify = tf.saved_model.load(tmp_path / "saved_model").signatures["serving_default"]
    batch = np.stack(pictures((8, 8)))
    np.testing.assert_allclose(
        classify(images=tf.constant(batch))["probabilities"], images.probabilities(batch), atol=1e-5
    )
    assert classify(images=tf.zeros((2, 20, 30, 3), "uint8"))["label"].shape == (2,)


def test_pipeline_from_images(tokenizer, images, tmp_path):
    def outputs(x, target_ids):
        y = keras.layers.Embedding(tokenizer.vocabulary_size(), 8)(target_ids)
        y = kt.layers.DecoderBlock(2, 16, cross_attention=2)(y, x)
        return keras.layers.Dense(tokenizer.vocabulary_size())(y)

    model = image_model(outputs, target_ids=keras.Input((None,), dtype="int32", name="target_ids"))
    pipeline = Pipeline(Generator(model, start_id=1, end_id=2), images.source, tokenizer, max_new_tokens=4)
    expected = pipeline.predict(pictures((8, 8)))
    assert len(set(expected)) > 1 and pipeline.predict(pictures((8, 8)), batch_size=1) == expected
    pipeline.save(tmp_path / "pipeline")
    assert load(tmp_path / "pipeline").predict(pictures((8, 8))) == expected
    pipeline.export(tmp_path / "saved_model")
    describe = tf.saved_model.load(tmp_path / "saved_model").signatures["serving_default"]
    texts = describe(images=tf.constant(np.stack(pictures((8, 8)))))["text"].numpy()
    assert [text.decode() for text in texts] == expected


BAD_INPUT = {
    "one string": (lambda c: c.predict("cat"), "`raw_inputs` must be a list"),
    "not a string": (lambda c: c.predict(["cat", 7]), "must be a text, a string; received 7"),
    "an empty text": (lambda c: c.predict(["cat", " "]), "number 1 has none: ' '"),
    "labels": (lambda c: Classifier(c.model, c.source, ["a", "b", "c"]), "`labels` must be 2"),
    "length": (lambda c: TokenReader(c.source.tokenizer, max_length=0), "`max_length` must be a positive"),
    "keep": (lambda c: TokenReader(c.source.tokenizer, keep="middle"), "`keep` must be one of"),
}


@pytest.mark.parametrize("call, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(texts, call, message):
    with pytest.raises(ValueError, match=message):
        call(texts)


def test_no_inputs(texts):
    assert texts.predict([]) == []
    assert texts.probabilities([]).shape == (0, 2)
