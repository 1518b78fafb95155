"""Exported files beside Keras: ONNX in onnxruntime, LiteRT with its built-in operations, sizes open in both."""

import itertools

import keras
import numpy as np
import pytest
from generation.test_decoding_step import assert_same_tokens
from small_models import decoder_only, scatter_weights, seq2seq

import keras_transformer as kt

BACKEND = keras.backend.backend()
SIZES = {"dim": 8, "depth": 1, "num_heads": 2, "hidden_dim": 12}


def encoder():
    """Keras parts that others mix in: projections without bias right before heads are split, a mask, two outputs."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(30, 8, mask_zero=True)(tokens)
    attention = kt.layers.MultiHeadSelfAttention(
        4, num_key_value_heads=2, position=kt.layers.RotaryEmbedding(), use_bias=False
    )
    gated = kt.layers.FeedForward(12, "gelu", gated=True, use_bias=False)
    x = kt.layers.EncoderBlock(attention, gated, keras.layers.RMSNormalization())(x)
    return keras.Model(tokens, {"hidden_states": x, "first": x[:, 0]})


ENCODERS = {
    "classifier": lambda: kt.models.text_classifier(30, 3, pooling="class_token", **SIZES),
    "encoder by hand": encoder,
    "images": lambda: kt.models.vision_transformer((16, 16, 3), 3, patch_size=8, **SIZES),
    "speech": lambda: kt.models.speech_recognizer(30, 6, **SIZES),
}


def in_onnxruntime(model, path):
    import onnxruntime

    kt.export.onnx(model, path / "model.onnx")
    session = onnxruntime.InferenceSession(path / "model.onnx")
    assert {x.name for x in session.get_inputs()} == {x.name for x in model.inputs}
    names = [x.name for x in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, feed), strict=True))


def in_litert(model, path):
    from ai_edge_litert.interpreter import Interpreter

    kt.export.litert(model, path / "model.tflite")
    # Flex operations, which need TensorFlow, would fail to be prepared here.
    runner = Interpreter(model_path=str(path / "model.tflite")).get_signature_runner("serving_default")
    return lambda feed: runner(**feed)


def feed_of(model, rows, length):
    random, feed = np.random.default_rng(length), {}
    for i, x in enumerate(model.inputs):
        shape = [rows, *(length + i if size is None else size for size in x.shape[1:])]
        if x.dtype == "int32":
            feed[x.name] = random.integers(1, 30, shape, "int32")
            feed[x.name][0, length - 1 :] = 0  # Padding.
        else:
            feed[x.name] = random.normal(size=shape).astype("float32")
    return feed


EXPORTED = {
    "tensorflow": [
        *itertools.product(["classifier", "encoder by hand"], [in_onnxruntime, in_litert]),
        *zip(["speech", "images"], [in_onnxruntime, in_litert], strict=True),
    ],
    "torch": [("encoder by hand", in_onnxruntime), ("speech", in_onnxruntime)],
    "jax": [],
}
STEPS = [(lambda: seq2seq(depth=1), in_onnxruntime), (lambda: decoder_only(learned=20), in_litert)]


@pytest.mark.parametrize("name, runtime", EXPORTED[BACKEND])
def test_outputs_are_those_of_keras(name, runtime, tmp_path):
    model = scatter_weights(ENCODERS[name]())
    exported = runtime(model, tmp_path)
    for rows, length in ((1, 4), (3, 9), (2, 33)):
        feed = feed_of(model, rows, length)
        wanted = model(feed if len(feed) > 1 else next(iter(feed.values())))
        wanted = wanted if isinstance(wanted, dict) else {"output_0": wanted}
        found = exported(feed)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], keras.ops.convert_to_numpy(value), atol=1e-4)


@pytest.mark.parametrize("model, runtime", STEPS if BACKEND == "tensorflow" else [])
def test_steps_decode_elsewhere(model, runtime, tmp_path):
    assert_same_tokens(model(), lambda part: runtime(part, tmp_path))


def unnamed():
    tokens = keras.Input((None,), dtype="int32")
    return keras.Model(tokens, keras.layers.Embedding(5, 4)(tokens))


@pytest.mark.parametrize("write, ending", [(kt.export.onnx, "onnx"), (kt.export.litert, "tflite")])
def test_inputs_need_names(write, ending, tmp_path):
    with pytest.raises(
        ValueError, match=r'must have inputs with names, as of `keras.Input\(\(None,\), name="token_ids"'
    ):
        write(unnamed(), tmp_path / f"model.{ending}")
    assert not list(tmp_path.iterdir())


class Exponential(keras.layers.Layer):
    def call(self, x):
        if BACKEND == "torch":
            return x.matrix_exp()
        import tensorflow as tf

        return tf.linalg.expm(x)


def with_foreign_operation():
    x = keras.Input((3, 3), name="features")
    return keras.Model(x, Exponential()(x))


def with_a_constant():
    x = keras.Input((3,), name="features")
    return keras.Model(x, keras.ops.add(x, keras.ops.ones((3,))))


def a_step():
    return kt.generation.decoding_step(decoder_only(learned=20))


BAD = {
    "tensorflow": [
        (kt.export.onnx, "onnx", with_foreign_operation, "ONNX has no counterpart of: Matrix"),
        (kt.export.onnx, "onnx", with_a_constant, "neither inputs nor variables"),
        (kt.export.litert, "tflite", with_foreign_operation, "Matrix"),
    ],
    "torch": [
        (kt.export.onnx, "onnx", with_foreign_operation, "matrix_exp"),
        (
            kt.export.onnx,
            "onnx",
            a_step,
            "no inputs from torch whose lengths have to agree, .* KERAS_BACKEND=tensorflow",
        ),
        (kt.export.litert, "tflite", encoder, "from torch that leaves .* `kt.export.litert.keras.saving.load_model"),
    ],
    "jax": [
        (
            kt.export.onnx,
            "onnx",
            encoder,
            "from jax that leaves .* KERAS_BACKEND=tensorflow: `kt.export.onnx.keras.sav",
        ),
        (kt.export.litert, "tflite", encoder, "from jax that leaves .* `kt.export.litert.keras.saving.load_model"),
    ],
}


@pytest.mark.parametrize(
    "write, ending, model, message",
    [*BAD[BACKEND], (kt.export.litert, "lite", encoder, "must end with `.tflite`; received")],
)
def test_what_cannot_be_exported_is_named_and_nothing_written(write, ending, model, message, tmp_path):
    (tmp_path / f"model.{ending}").write_text("earlier")
    with pytest.raises(Exception, match=message):
        write(model(), tmp_path / f"model.{ending}")
    assert (tmp_path / f"model.{ending}").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
