"""Metrics over sequences of tokens."""

import keras
from keras import ops

from keras_transformer.training.losses import SmoothedCrossEntropy, _TokenLoss


class _TokenWeights(_TokenLoss):
    """The weight of each token, unreduced: a loss, because a loss is Keras' public way to an output's mask."""

    def __init__(self, pad_id):
        super().__init__(pad_id, name="token_weights", reduction="none")

    def call(self, y_true, y_pred):
        return ops.ones_like(y_true, dtype="float32")


class _TokenMean(keras.metrics.Metric):
    """Base of the metrics that are a mean over all real tokens seen since the last reset.

    `keras.metrics.Mean` averages over each sequence before it averages over the batch, and so lets the tokens of a
    long batch count less than those of a short one. Here a sum and a count run over tokens.
    """

    def __init__(self, pad_id, name, dtype):
        super().__init__(name=name, dtype=dtype)
        self.token_weights = _TokenWeights(pad_id)
        self.pad_id = pad_id
        self.total = self.add_variable((), "zeros", name="total", dtype="float32")
        self.count = self.add_variable((), "zeros", name="count", dtype="float32")

    def update_state(self, y_true, y_pred, sample_weight=None):
        weights = self.token_weights(y_true, y_pred, sample_weight)  # [B, T]
        labels = ops.cast(ops.convert_to_tensor(y_true), "int32")
        self.total.assign_add(ops.sum(weights * self.values(labels, ops.convert_to_tensor(y_pred))))
        self.count.assign_add(ops.sum(weights))

    def result(self):
        return ops.cast(ops.divide_no_nan(self.total, self.count), self.dtype)

    def get_config(self):
        return {"pad_id": self.pad_id, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="keras_transformer")
class TokenAccuracy(_TokenMean):
    """Share of the real tokens whose highest logit is the label's.

    Every real token of an epoch counts alike, however its batch was padded. Positions whose label is `pad_id`, and
    those that the mask of the model's output leaves out, do not count. No token at all gives 0.

    Args:
        pad_id: Integer or `None`, the label to ignore. `None` ignores no label.
        name: String, name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        y_true: Integer tensor of shape `(batch, length)`, the labels.
        y_pred: Float tensor of shape `(batch, length, vocabulary)`, logits or probabilities.
        sample_weight: Optional tensor of shape `(batch,)` or `(batch, length)`.

    Returns:
        `result()` is a scalar between 0 and 1.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.training import TokenAccuracy
    >>> accuracy = TokenAccuracy()
    >>> accuracy.update_state(np.array([[2, 1, 0]]), np.eye(3)[[[2, 2, 0]]])  # right, wrong, padding
    >>> float(accuracy.result())
    0.5
    """

    def __init__(self, pad_id=0, name="token_accuracy", dtype=None):
        super().__init__(pad_id, name, dtype)
        self._direction = "up"

    def values(self, labels, logits):
        return ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), labels), "float32")


@keras.saving.register_keras_serializable(package="keras_transformer")
class Perplexity(_TokenMean):
    """Exponential of the mean negative log-likelihood of a real token.

    The mean runs over all real tokens since the last reset, and only then is its exponential taken; no label
    smoothing enters. Positions whose label is `pad_id`, and those that the mask of the model's output leaves out, do
    not count. No token at all gives 1.

    Args:
        pad_id: Integer or `None`, the label to ignore. `None` ignores no label.
        name: String, name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        y_true: Integer tensor of shape `(batch, length)`, the labels.
        y_pred: Float tensor of shape `(batch, length, vocabulary)`, the logits.
        sample_weight: Optional tensor of shape `(batch,)` or `(batch, length)`.

    Returns:
        `result()` is a scalar, 1 or greater.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.training import Perplexity
    >>> perplexity = Perplexity()
    >>> perplexity.update_state(np.array([[2, 1, 0]]), np.zeros((1, 3, 10)))  # ten tokens, all equally likely
    >>> print(f"{float(perplexity.result()):.4f}")
    10.0000
    """

    def __init__(self, pad_id=0, name="perplexity", dtype=None):
        super().__init__(pad_id, name, dtype)
        self._direction = "down"
        self.cross_entropy = SmoothedCrossEntropy(label_smoothing=0.0, pad_id=pad_id)

    def values(self, labels, logits):
        return self.cross_entropy.call(labels, logits)

    def result(self):
        return ops.cast(ops.exp(ops.divide_no_nan(self.total, self.count)), self.dtype)
