"""What `AttentionImages` writes, read back as TensorBoard reads it."""

import io

import keras
import numpy as np
import pytest
from keras import ops

import keras_transformer as kt
from keras_transformer.training.gradients import gradients

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], "int32")


def language_model():
    model = kt.models.causal_lm(12, dim=8, depth=2, num_heads=2, hidden_dim=16)
    model.compile("sgd", kt.training.SmoothedCrossEntropy())
    return model


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def scalar(event):
    from tensorboard.util.tensor_util import make_ndarray

    return float(make_ndarray(event.tensor_proto))


def test_images_answers_and_norms_are_read_back(tmp_path):
    from PIL import Image

    model = language_model()
    callback = kt.training.AttentionImages(tmp_path, IDS[:1], IDS[:1], names=[f"<{i}>" for i in range(12)])
    model.fit(IDS, IDS, epochs=2, verbose=0, callbacks=[callback])
    read = events(tmp_path)
    maps = kt.inspection.attention_maps(model, IDS[:1])
    assert {f"attention/{path}" for path in maps} <= set(read.Tags()["tensors"])
    for path, weights in maps.items():
        first, last = read.Tensors(f"attention/{path}")
        assert (first.step, last.step) == (0, 1)
        _, _, *images = last.tensor_proto.string_val
        assert len(images) == 2
        for image, expected in zip(images, weights[0], strict=True):
            shown = np.asarray(Image.open(io.BytesIO(image)))
            assert shown.shape == (125, 125)
            np.testing.assert_allclose(shown[12::25, 12::25] / 255, expected, atol=0.01)
    text = read.Tensors("answers")[1].tensor_proto.string_val[0].decode()
    scores = ops.convert_to_numpy(model(IDS[:1]))[0, -1]
    assert text.splitlines()[2].startswith(f"| <{scores.argmax()}> |") and len(text.splitlines()) == 7
    found = gradients(model, ops.convert_to_tensor(IDS[:1]), IDS[:1])
    norm = scalar(read.Tensors("gradient_norm/decoder_block_1")[1])
    squares = [
        np.square(x).sum()
        for x, variable in zip(found, model.trainable_variables, strict=True)
        if variable.path.startswith("decoder_block_1/")
    ]
    assert norm == pytest.approx(sum(squares) ** 0.5, rel=1e-4)


def test_training_goes_on_as_without_it(tmp_path):
    weights = []
    for callbacks in ([], [kt.training.AttentionImages(tmp_path, IDS[:1], IDS[:1], every=1)]):
        keras.utils.set_random_seed(0)
        model = language_model()
        model.fit(IDS, IDS, epochs=3, batch_size=1, verbose=0, callbacks=callbacks)
        weights.append([ops.convert_to_numpy(x) for x in model.variables])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [event.step for event in events(tmp_path).Tensors("answers")] == [1, 2, 3, 4, 5, 6]


def test_gradients_are_those_of_the_loss():
    model = language_model()
    found = gradients(model, ops.convert_to_tensor(IDS), IDS)
    i, variable = next((i, x) for i, x in enumerate(model.trainable_variables) if x.path.endswith("query/kernel"))
    kernel = ops.convert_to_numpy(variable)
    losses = []
    for step in (1e-2, -1e-2):
        changed = kernel.copy()
        changed[0, 0] += step
        variable.assign(changed)
        losses.append(float(model.evaluate(IDS, IDS, verbose=0)))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(found[i][0, 0], rel=0.05, abs=1e-4)


def test_bad_input(tmp_path):
    for every in (0, "batch", 1.5):
        with pytest.raises(ValueError, match="`every` must be 'epoch' or a number"):
            kt.training.AttentionImages(tmp_path, IDS, every=every)
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    callback = kt.training.AttentionImages(tmp_path, np.ones((1, 2), "float32"))
    with pytest.raises(ValueError, match="which called none"):
        model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0, callbacks=[callback])
