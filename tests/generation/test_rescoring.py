"""Recognition in two passes, against the scores of every text that there is."""

import functools
import itertools

import keras
import numpy as np
import pytest

import keras_transformer as kt
from keras_transformer.generation import AttentionRescoring
from keras_transformer.generation.batches import pad_rows
from keras_transformer.generation.rescoring import ctc_beam_search

VOCABULARY, FEATURES = 5, 8


def recognizer(seed=0, **options):
    keras.utils.set_random_seed(seed)
    return kt.models.speech_recognizer(VOCABULARY, FEATURES, dim=16, depth=1, num_heads=2, hidden_dim=16, **options)


def sounds(seed, *frames):
    random, x = np.random.default_rng(seed), np.zeros((len(frames), max(frames), FEATURES), "float32")
    for row, count in zip(x, frames, strict=True):
        row[:count] = random.normal(size=(count, FEATURES))
    return x


def answer(model, inputs, name):
    tensors = {key: keras.ops.convert_to_tensor(x) for key, x in inputs.items()}
    logits = keras.ops.cast(model(tensors, training=False)[name], "float32")
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.log_softmax(logits)), "float64")


@functools.cache
def case(seed):
    """A model, three sounds, and of each text that fits three frames the two scores for each sound.

    CTC's is by its definition, over all alignments.
    """
    model, features = recognizer(seed), sounds(seed, 12, 12, 8)
    for name, weight in (("ctc_projection", "kernel"), ("target_embedding", "embeddings")):
        variable = getattr(model.get_layer(name), weight)
        variable.assign(3 * variable)  # Which makes the answers less alike.
    frames = answer(model, {"features": features, "target_ids": np.ones((3, 1), "int32")}, "ctc_logits")
    by_ctc = [{} for _ in frames]
    for path in itertools.product(range(VOCABULARY), repeat=frames.shape[1]):
        text = tuple(token for token, _ in itertools.groupby(path) if token)
        for scores, rows in zip(by_ctc, frames, strict=True):
            score = sum(row[token] for row, token in zip(rows, path, strict=True))
            scores[text] = np.logaddexp(scores.get(text, -np.inf), score)
    texts = sorted(by_ctc[0])
    ids = pad_rows([[1, *text] for text in texts], 0)
    both = []
    for i, scores in enumerate(by_ctc):
        tokens = answer(model, {"features": features[[i] * len(texts)], "target_ids": ids}, "logits")
        said = [
            sum(row[t] for row, t in zip(rows, (*text, 2), strict=False))
            for rows, text in zip(tokens, texts, strict=True)
        ]
        possible = {text for text in texts if scores[text] > -5000}  # The others say something in padding.
        both.append({text: (scores[text], score) for text, score in zip(texts, said, strict=True) if text in possible})
    return model, features, both


@pytest.mark.parametrize("ctc_weight", [0.05, 0.3, 0.5, 1.0])
def test_the_answer_is_the_best_of_all_texts(ctc_weight):
    found, expected = [], []
    for seed in range(3):
        model, features, both = case(seed)
        recognize = AttentionRescoring(model, 1, 2, width=60, ctc_weight=ctc_weight)
        ids = recognize.generate({"features": features}, 6)
        assert ids.dtype == "int32" and ids.shape == (3, 6)
        found += [tuple(int(i) for i in row if i) for row in ids]
        for scores in both:
            total = {text: ctc_weight * ctc + (1 - ctc_weight) * said for text, (ctc, said) in scores.items()}
            expected.append((*max(total, key=total.get), 2))
    assert found == expected
    assert len(set(found)) > 1


def test_texts_come_with_the_sum_over_their_alignments():
    model, features, both = case(0)
    logits = model(
        {"features": keras.ops.convert_to_tensor(features), "target_ids": keras.ops.ones((3, 1), "int32")},
        training=False,
    )["ctc_logits"]
    texts, scores = (keras.ops.convert_to_numpy(x) for x in ctc_beam_search(logits, 60))
    for rows, values, expected in zip(texts, scores, both, strict=True):
        best = sorted((ctc for ctc, _ in expected.values()), reverse=True)
        np.testing.assert_allclose(values[: len(best)], best, atol=1e-4)
        assert np.isneginf(values[len(best) :]).all()
        for row, value in zip(rows, values[: len(best)], strict=False):
            np.testing.assert_allclose(value, expected[tuple(int(i) for i in row if i)][0], atol=1e-4)


def test_what_there_is_no_room_for():
    model = recognizer()
    model.get_layer("ctc_projection").bias.assign([0, 0, 0, 9, 8])
    recognize = AttentionRescoring(model, 1, 2, width=8)
    whole = recognize.generate({"features": sounds(0, 32)}, 12)
    assert (whole == 2).sum() == 1
    np.testing.assert_array_equal(recognize.generate({"features": sounds(0, 32)}, 1), whole[:, :1])
    assert recognize.generate({"features": sounds(0, 32)[:0]}, 3).shape == (0, 3)


def test_padding_changes_nothing():
    model = recognizer(1)
    recognize = AttentionRescoring(model, 1, 2, width=8)
    short, padded = sounds(3, 24), np.pad(sounds(3, 24), ((0, 0), (0, 16), (0, 0)))
    expected = recognize.generate({"features": short}, 8)
    np.testing.assert_array_equal(recognize.generate({"features": padded}, 8), expected)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a tf.function is TensorFlow's own")
def test_a_graph_of_unknown_sizes_gives_the_same():
    import tensorflow as tf

    recognize = AttentionRescoring(recognizer(2), 1, 2, width=8)
    signature = [tf.TensorSpec([None, None, FEATURES], "float32")]
    graph = tf.function(lambda x: recognize.generate_tensors({"features": x}, 9), signature, autograph=False)
    for frames in ((32,), (40, 20)):
        features = sounds(0, *frames)
        np.testing.assert_array_equal(graph(features).numpy(), recognize.generate({"features": features}, 9))


def test_bad_input():
    with pytest.raises(ValueError, match="'logits' and 'ctc_logits'.*received one with a single output"):
        AttentionRescoring(recognizer(ctc=False), 1, 2)
    model = recognizer()
    for options, message in (({"width": 0}, "received width=0"), ({"ctc_weight": 1.5}, "ctc_weight=1.5")):
        with pytest.raises(ValueError, match=message):
            AttentionRescoring(model, 1, 2, **options)
    recognize = AttentionRescoring(model, 1, 2)
    with pytest.raises(ValueError, match=r"must be \['features'\]; received \['sound'\]"):
        recognize.generate({"sound": sounds(0, 8)}, 3)
    with pytest.raises(ValueError, match="`max_new_tokens` must be positive; received 0"):
        recognize.generate({"features": sounds(0, 8)}, 0)
