"""A recognizer of speech: padding changes nothing, both answers are trained, and it learns."""

import keras
import numpy as np
import pytest
from harness import as_numpy, random
from keras import ops

import keras_transformer as kt

SIZES = {"dim": 16, "depth": (2, 1), "num_heads": 2, "hidden_dim": 32}
TARGETS = np.array([[1, 5, 6, 0], [1, 7, 0, 0], [1, 4, 4, 8]], "int32")


def sounds(*lengths, size=None, features=6):
    """Random frames, followed by zeros."""
    frames = random(len(lengths), size or max(lengths), features)
    return frames * (np.arange(frames.shape[1]) < np.array(lengths)[:, None])[..., None]


def answers(model, features, targets=TARGETS, **options):
    inputs = {"features": ops.convert_to_tensor(features), "target_ids": ops.convert_to_tensor(targets)}
    return {name: as_numpy(x) for name, x in model(inputs, **options).items()}


@pytest.mark.parametrize("position", [None, kt.layers.RotaryEmbedding()], ids=["sinusoidal", "rotary"])
def test_padding_changes_nothing_and_a_file_holds_all_of_it(position, tmp_path):
    model = kt.models.speech_recognizer(9, 6, **SIZES, position=position, augmentation=kt.layers.SpecAugment())
    lengths = (21, 10, 13)
    features = sounds(*lengths)
    features[0, 4] = 0  # Silence within a sound is no frame either.
    together = answers(model, features)
    assert together["logits"].shape == (3, 4, 9) and together["ctc_logits"].shape == (3, 6, 9)
    longer = answers(model, np.pad(features, ((0, 0), (0, 11), (0, 0))))
    np.testing.assert_allclose(longer["logits"], together["logits"], atol=1e-5)
    np.testing.assert_allclose(longer["ctc_logits"][:, :6], together["ctc_logits"], atol=1e-5)
    for i, length in enumerate(lengths):
        alone = answers(model, features[i : i + 1, :length], TARGETS[i : i + 1])
        np.testing.assert_allclose(alone["logits"][0], together["logits"][i], atol=1e-5)
        frames = -(-length // 4)
        np.testing.assert_allclose(alone["ctc_logits"][0], together["ctc_logits"][i, :frames], atol=1e-5)
        padding = np.exp(together["ctc_logits"][i, frames:])
        np.testing.assert_array_equal(padding, np.eye(9)[[0] * len(padding)].reshape(padding.shape))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for name, expected in together.items():
        np.testing.assert_allclose(answers(again, features)[name], expected, atol=1e-6)


def test_a_generator_reads_the_answer_of_the_decoder():
    model = kt.models.speech_recognizer(9, 6, **SIZES)
    features = sounds(21, 10)
    generator = kt.generation.Generator(model, start_id=1)
    written = generator.generate({"features": features}, 4)
    for i, length in enumerate((21, 10)):
        tokens = [1]
        for _ in range(4):
            logits = answers(model, features[i : i + 1, :length], np.array([tokens], "int32"))["logits"]
            tokens.append(int(logits[0, -1].argmax()))
        assert written[i].tolist() == tokens[1:]
    beams = kt.generation.Generator(model, start_id=1, end_id=2, sampler=kt.generation.BeamSearch(3))
    alone = beams.generate({"features": features[1:, :10]}, 4)
    np.testing.assert_array_equal(beams.generate({"features": features}, 4)[1:], alone)


def test_spectra_are_hidden_in_training_alone():
    hides = kt.layers.SpecAugment(time_masks=1, time_share=0.9, feature_masks=1, feature_share=0.9, seed=3)
    model = kt.models.speech_recognizer(9, 6, **SIZES, augmentation=hides, dropout=0.0)
    features = sounds(21, 10, 13)
    np.testing.assert_array_equal(answers(model, features)["logits"], answers(model, features)["logits"])
    trained = [answers(model, features, training=True)["logits"] for _ in range(2)]
    assert np.abs(trained[0] - trained[1]).max() > 1e-3


def test_it_learns_to_write_down_tones():
    """Each of four tones is a feature of its own, held for 8 frames, with a pause between equal ones."""
    random_state, features = np.random.default_rng(0), np.zeros((96, 48, 6), "float32")
    labels = np.zeros((96, 4), "int32")
    for row, label in zip(features, labels, strict=True):
        count = random_state.integers(1, 5)
        label[:count] = random_state.integers(3, 7, count)
        for i, tone in enumerate(label[:count]):
            row[12 * i : 12 * i + 8, tone - 3] = 1
            row[12 * i : 12 * i + 12, 4] = 0.5
    targets = np.pad(labels, ((0, 0), (1, 0)), constant_values=1)
    said = np.pad(labels, ((0, 0), (0, 1)))
    said[np.arange(96), (labels > 0).sum(axis=-1)] = 2
    model = kt.models.speech_recognizer(7, 6, dim=32, depth=(1, 1), num_heads=2, hidden_dim=64, dropout=0.0)
    losses = {"logits": kt.training.SmoothedCrossEntropy(0.0), "ctc_logits": kt.training.CTCLoss()}
    options = {"loss_weights": {"logits": 0.7, "ctc_logits": 0.3}, "metrics": {"logits": [kt.training.TokenAccuracy()]}}
    model.compile(keras.optimizers.Adam(3e-3), losses, **options)
    inputs, truth = {"features": features, "target_ids": targets}, {"logits": said, "ctc_logits": labels}
    model.fit(inputs, truth, epochs=40, batch_size=32, verbose=0)
    found = model.evaluate(inputs, truth, return_dict=True, verbose=0)
    assert found["logits_token_accuracy"] > 0.95 and found["ctc_logits_loss"] < 0.2
    frames = answers(model, features, targets)["ctc_logits"].argmax(axis=-1)
    spelled = [[a for a, b in zip(row, [0, *row], strict=False) if a and a != b] for row in frames]
    wanted = [[x for x in row if x] for row in labels.tolist()]
    assert sum(a == b for a, b in zip(spelled, wanted, strict=True)) > 90


@pytest.mark.parametrize("depth", [0, (2, 0), (1, 2, 3)])
def test_bad_input(depth):
    with pytest.raises(ValueError, match="`depth` must be a positive number of blocks, or a pair"):
        kt.models.speech_recognizer(9, 6, depth=depth)
