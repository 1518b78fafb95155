"""The metrics against numpy over uneven batches: each real token of an epoch counts alike."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_transformer.training import Perplexity, SmoothedCrossEntropy, TokenAccuracy

VOCABULARY = 7


def make_batches():
    """Batches that differ in size, length and share of padding."""
    generator = np.random.default_rng(0)
    batches = []
    for size, length, padding in [(4, 3, 0), (1, 9, 5), (3, 6, 2), (2, 1, 0)]:
        labels = generator.integers(1, VOCABULARY, (size, length)).astype("int32")
        if padding:
            labels[:, -padding:] = 0
        logits = generator.normal(size=(size, length, VOCABULARY)).astype("float32")
        batches.append((labels, logits))
    return batches


def accuracy_of(labels, logits):
    return (logits.argmax(-1) == labels).astype("float64")


def nll_of(labels, logits):
    logits = logits.astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, labels[..., None], -1)[..., 0]


METRICS = [
    pytest.param(TokenAccuracy, accuracy_of, lambda mean: mean, id="accuracy"),
    pytest.param(Perplexity, nll_of, np.exp, id="perplexity"),
]
WEIGHTS = [
    pytest.param(None, id="unweighted"),
    pytest.param(lambda labels: np.arange(1.0, len(labels) + 1), id="sentence"),
    pytest.param(lambda labels: np.arange(labels.size, dtype="float32").reshape(labels.shape), id="token"),
]


@pytest.mark.parametrize("metric_class, value_of, finish", METRICS)
@pytest.mark.parametrize("pad_id", [0, None, 3])
@pytest.mark.parametrize("weigh", WEIGHTS)
def test_equals_numpy_over_uneven_batches(metric_class, value_of, finish, pad_id, weigh):
    metric = metric_class(pad_id=pad_id)
    total = count = 0.0
    for labels, logits in make_batches():
        weights = None if weigh is None else weigh(labels)
        metric.update_state(labels, logits, sample_weight=weights)
        token_weights = np.ones(labels.shape) if pad_id is None else (labels != pad_id).astype("float64")
        if weights is not None:
            token_weights = token_weights * (weights[:, None] if weights.ndim == 1 else weights)
        total += (value_of(labels, logits) * token_weights).sum()
        count += token_weights.sum()
    np.testing.assert_allclose(float(metric.result()), finish(total / count), rtol=1e-6)


@pytest.mark.parametrize("metric_class, value_of, finish", METRICS)
def test_reset_and_empty(metric_class, value_of, finish):
    metric = metric_class()
    nothing = finish(0.0)
    assert float(metric.result()) == nothing
    metric.update_state(np.zeros((2, 3), "int32"), np.ones((2, 3, VOCABULARY), "float32"))
    assert float(metric.result()) == nothing
    metric.update_state(*make_batches()[0])
    assert float(metric.result()) != nothing
    metric.reset_state()
    assert float(metric.result()) == nothing


@pytest.mark.parametrize("metric_class, value_of, finish", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_mask_of_the_model_output(metric_class, value_of, finish, weighted, run_eagerly):
    source = keras.Input((None,), dtype="int32")
    model = keras.Model(source, keras.layers.Embedding(VOCABULARY, VOCABULARY, mask_zero=True)(source))
    metric = metric_class(pad_id=None, name="metric")
    model.compile(
        loss=SmoothedCrossEntropy(),
        **{"weighted_metrics" if weighted else "metrics": [metric]},
        run_eagerly=run_eagerly,
    )
    generator = np.random.default_rng(1)
    ids = generator.integers(0, VOCABULARY, (10, 4)).astype("int32")
    labels = generator.integers(0, VOCABULARY, (10, 4)).astype("int32")
    weights = generator.uniform(size=(10,)).astype("float32")
    logits = ops.convert_to_numpy(model(ids))
    token_weights = (ids != 0) * (weights[:, None] if weighted else 1.0)
    expected = finish((value_of(labels, logits) * token_weights).sum() / token_weights.sum())
    # Batches of 4, 4 and 2.
    logs = model.evaluate(ids, labels, sample_weight=weights, batch_size=4, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["metric"], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits(dtype):
    # float16 could not even count these tokens.
    labels = np.full((300, 300), 3, "int32")
    logits = ops.cast(np.tile(np.array([0, 0, 0, 1, 0, 0, 0], "float32"), (300, 300, 1)), dtype)
    accuracy, perplexity = TokenAccuracy(), Perplexity()
    accuracy.update_state(labels, logits)
    perplexity.update_state(labels, logits)
    assert float(accuracy.result()) == 1.0
    np.testing.assert_allclose(float(perplexity.result()), (np.e + 6) / np.e, rtol=1e-5)


@pytest.mark.parametrize("metric_class", [TokenAccuracy, Perplexity])
@pytest.mark.parametrize("arguments", [{}, dict(pad_id=None, name="other", dtype="float64"), dict(pad_id=-100)])
def test_configuration_round_trip(metric_class, arguments):
    metric = metric_class(**arguments)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert type(restored) is metric_class
    assert restored.get_config() == metric.get_config()


@pytest.mark.parametrize("metric_class, monitor", [(TokenAccuracy, "token_accuracy"), (Perplexity, "perplexity")])
def test_early_stopping_knows_the_direction(metric_class, monitor):
    source = keras.Input((None,), dtype="int32")
    model = keras.Model(source, keras.layers.Embedding(VOCABULARY, VOCABULARY)(source))
    model.compile(optimizer=keras.optimizers.SGD(100.0), loss=SmoothedCrossEntropy(), metrics=[metric_class()])
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (8, 4)).astype("int32")
    stopping = keras.callbacks.EarlyStopping(monitor=monitor, patience=10)
    values = model.fit(ids, ids, epochs=3, verbose=0, callbacks=[stopping]).history[monitor]
    assert stopping.best == (max if monitor == "token_accuracy" else min)(values)


@pytest.mark.parametrize("metric_class", [TokenAccuracy, Perplexity])
def test_bad_arguments(metric_class):
    with pytest.raises(ValueError, match="`pad_id` must be an integer"):
        metric_class(pad_id=0.5)
    with pytest.raises(ValueError, match=r"y_pred of shape \(2, 3, 7\) and y_true of shape \(2, 4\)"):
        metric_class().update_state(np.ones((2, 4), "int32"), np.ones((2, 3, 7), "float32"))
