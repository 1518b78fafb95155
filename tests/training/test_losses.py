"""The loss against plain numpy, against Keras' own on one-hot labels, and under every kind of mask."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_transformer.training import SmoothedCrossEntropy

BATCH, LENGTH, VOCABULARY = 3, 5, 11
# Three sentences of 5, 3 and 1 tokens.
LABELS = np.array([[4, 1, 7, 2, 10], [3, 9, 2, 0, 0], [5, 0, 0, 0, 0]], "int32")
REAL = LABELS != 0


def make_logits(scale=1.0, dtype="float32"):
    return (np.random.default_rng(0).normal(size=(BATCH, LENGTH, VOCABULARY)) * scale).astype(dtype)


def reference(labels, logits, epsilon):
    """Per-token loss by definition: the full target distribution times the full log-softmax, in float64."""
    logits = np.asarray(logits, "float64")
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    target = np.eye(logits.shape[-1])[labels] * (1 - epsilon) + epsilon / logits.shape[-1]
    return -(target * log_probabilities).sum(-1)


def gradient(function, x):
    """Gradient of a scalar function of one array, by the backend's own automatic differentiation."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return ops.convert_to_numpy(tape.gradient(value, x))
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(function)(x))
    x = ops.convert_to_tensor(x).detach().requires_grad_(True)
    function(x).backward()
    return x.grad.cpu().numpy()


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("pad_id", [0, None, 2])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_numpy(epsilon, pad_id, scale):
    logits = make_logits(scale)
    real = np.ones_like(REAL) if pad_id is None else LABELS != pad_id
    expected = reference(LABELS, logits, epsilon)[real].mean()
    loss = SmoothedCrossEntropy(epsilon, pad_id=pad_id)(LABELS, logits)
    np.testing.assert_allclose(float(loss), expected, rtol=2e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_equals_keras_on_one_hot_labels(epsilon):
    logits = make_logits()
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=epsilon, reduction=None)
    expected = ops.convert_to_numpy(keras_loss(np.eye(VOCABULARY, dtype="float32")[LABELS], logits))
    per_token = ops.convert_to_numpy(SmoothedCrossEntropy(epsilon, pad_id=None).call(LABELS, ops.array(logits)))
    np.testing.assert_allclose(per_token, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_gradient_is_softmax_minus_target(epsilon):
    logits = make_logits()
    loss = SmoothedCrossEntropy(epsilon)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    target = np.eye(VOCABULARY)[LABELS] * (1 - epsilon) + epsilon / VOCABULARY
    expected = (softmax - target) * REAL[..., None] / REAL.sum()
    actual = gradient(lambda x: loss(LABELS, x), logits)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert np.all(actual[~REAL] == 0.0)


@pytest.mark.parametrize("extra", [1, 7])
def test_padding_changes_nothing(extra):
    loss = SmoothedCrossEntropy()
    logits = make_logits()
    longer_labels = np.pad(LABELS, ((0, 2), (0, extra)))
    longer_logits = np.pad(logits, ((0, 2), (0, extra), (0, 0)), constant_values=1e3)
    np.testing.assert_allclose(float(loss(longer_labels, longer_logits)), float(loss(LABELS, logits)), rtol=1e-6)


def expected_weighted(weights):
    values = reference(LABELS, make_logits(), 0.1)
    weights = np.broadcast_to(weights, LABELS.shape) * REAL
    return (values * weights).sum() / weights.sum()


@pytest.mark.parametrize(
    "weights",
    [
        np.array([1.0, 2.0, 0.5], "float32"),
        np.array([0, 1, 1], "int64"),
        np.array([[1.0], [2.0], [0.5]], "float32"),
        np.arange(15, dtype="float32").reshape(3, 5),
        np.full((3, 5), 7.0, "float32"),
    ],
    ids=["sentence", "left_out", "column", "token", "constant"],
)
def test_sample_weight(weights):
    loss = SmoothedCrossEntropy()(LABELS, make_logits(), sample_weight=weights)
    expected = expected_weighted(weights[:, None] if weights.ndim == 1 else weights)
    np.testing.assert_allclose(float(loss), expected, rtol=2e-6)


def test_sentence_weights_do_not_turn_into_token_weights_of_a_square_batch():
    labels, logits = LABELS[:, :3], make_logits()[:, :3]
    weights = np.array([1.0, 10.0, 100.0], "float32")
    values, token_weights = reference(labels, logits, 0.1), weights[:, None] * (labels != 0)
    expected = (values * token_weights).sum() / token_weights.sum()
    np.testing.assert_allclose(float(SmoothedCrossEntropy()(labels, logits, weights)), expected, rtol=2e-6)


def masked_model(pad_id_in_source=True):
    """Maps token ids to logits by table; its output carries the mask of `source_ids != 0`."""
    source = keras.Input((None,), dtype="int32", name="source_ids")
    outputs = keras.layers.Embedding(VOCABULARY, VOCABULARY, mask_zero=pad_id_in_source)(source)
    return keras.Model(source, outputs)


@pytest.mark.parametrize("mask_zero", [True, False])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.5], "float32")], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    "pad_id, source",
    [
        (0, LABELS),  # mask and labels leave out the same positions
        (0, np.where(LABELS == 2, 0, LABELS)),  # the mask leaves out more than the labels
        (0, np.where(LABELS == 0, 3, LABELS)),  # the mask leaves out nothing
        (None, LABELS),  # only the mask leaves out
    ],
    ids=["same", "mask_more", "labels_only", "mask_only"],
)
def test_mask_of_the_model_output_is_counted_once(mask_zero, weights, pad_id, source):
    model = masked_model(mask_zero)
    model.compile(loss=SmoothedCrossEntropy(pad_id=pad_id))
    kept = np.ones_like(LABELS, dtype=bool) if pad_id is None else LABELS != pad_id
    if mask_zero:
        kept &= source != 0
    token_weights = kept * (np.ones((3, 1)) if weights is None else weights[:, None])
    logits = ops.convert_to_numpy(model(source))
    expected = (reference(LABELS, logits, 0.1) * token_weights).sum() / token_weights.sum()
    actual = model.evaluate(source, LABELS, sample_weight=weights, batch_size=3, verbose=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("mask_zero", [True, False])
def test_batch_without_a_real_token_is_zero(mask_zero):
    model = masked_model(mask_zero)
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss=SmoothedCrossEntropy())
    before = model.get_weights()
    empty = np.zeros((2, 4), "int32")
    assert model.train_on_batch(empty, empty) == 0.0
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_labels_that_are_no_token_can_be_ignored():
    labels = np.where(REAL, LABELS, -100)
    expected = float(SmoothedCrossEntropy(pad_id=0)(LABELS, make_logits()))
    assert float(SmoothedCrossEntropy(pad_id=-100)(labels, make_logits())) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_large_logits_stay_finite(dtype, epsilon):
    logits = ops.cast(make_logits() * 300 + np.sign(make_logits()) * 1e3, dtype)
    exact = ops.convert_to_numpy(ops.cast(logits, "float32"))
    loss = SmoothedCrossEntropy(epsilon)
    value = loss(LABELS, logits)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    np.testing.assert_allclose(float(value), reference(LABELS, exact, epsilon)[REAL].mean(), rtol=1e-5)
    assert np.all(np.isfinite(gradient(lambda x: loss(LABELS, x), exact)))


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_token_ids_survive_a_half_precision_default(floatx):
    keras.config.set_floatx(floatx)
    labels = np.array([[2049, 4097]], "int32")  # neither is a float16 or bfloat16 number
    logits = np.zeros((1, 2, 5000), "float32")
    logits[0, 0, 2049] = logits[0, 1, 4097] = 20.0
    assert float(SmoothedCrossEntropy(0.0)(labels, logits)) < 1e-3


def test_mixed_precision_model():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((None,), dtype="int32"), keras.layers.Embedding(VOCABULARY, VOCABULARY)])
    model.compile(optimizer="sgd", loss=SmoothedCrossEntropy())
    logits = ops.convert_to_numpy(ops.cast(model(LABELS), "float32"))
    loss = model.train_on_batch(LABELS, LABELS)
    np.testing.assert_allclose(loss, reference(LABELS, logits, 0.1)[REAL].mean(), rtol=2e-3)


def test_eager_equals_compiled():
    values = []
    for run_eagerly in (True, False):
        keras.utils.set_random_seed(0)
        model = masked_model()
        model.compile(loss=SmoothedCrossEntropy(), run_eagerly=run_eagerly)
        values.append(model.evaluate(LABELS, LABELS, verbose=0))
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize("arguments", [{}, dict(label_smoothing=0.2, pad_id=None, name="criterion"), dict(pad_id=-100)])
def test_configuration_round_trip(arguments):
    loss = SmoothedCrossEntropy(**arguments)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert isinstance(restored, SmoothedCrossEntropy)
    assert restored.get_config() == loss.get_config()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SmoothedCrossEntropy(1.0), "`label_smoothing` must lie in"),
        (lambda: SmoothedCrossEntropy(-0.1), "`label_smoothing` must lie in.*-0.1"),
        (lambda: SmoothedCrossEntropy(pad_id=0.5), "`pad_id` must be an integer, or None.*0.5"),
        (lambda: SmoothedCrossEntropy(pad_id="pad"), "`pad_id` must be an integer, or None.*'pad'"),
        (
            lambda: SmoothedCrossEntropy()(LABELS[:, :4], make_logits()),
            r"received y_pred of shape \(3, 5, 11\).*\(3, 4\)",
        ),
        (lambda: SmoothedCrossEntropy()(LABELS[:, :1], make_logits()), r"y_true of shape \(3, 1\)"),
        (lambda: SmoothedCrossEntropy()(LABELS[..., None], make_logits()), r"y_true of shape \(3, 5, 1\)"),
        (
            lambda: SmoothedCrossEntropy()(LABELS, make_logits(), np.ones((3, 5, 1))),
            r"`sample_weight` must hold one weight a sequence.*\(3, 5, 1\)",
        ),
        (lambda: SmoothedCrossEntropy()(LABELS, make_logits(), np.ones((5,))), r"`sample_weight`.*\(5,\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
