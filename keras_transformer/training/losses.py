"""Losses over sequences of tokens."""

import numbers

import keras
from keras import ops


class _TokenLoss(keras.losses.Loss):
    """Base of the losses that weigh every real token alike, whatever the padding around it.

    A token counts with the product of what its label says (nothing for `pad_id`), its sample weight and the mask
    that the model put on its output. All of it becomes one weight a token, so a position that is left out twice, by
    its label and by the mask, is left out just the same.
    """

    def __init__(self, pad_id, name, reduction):
        if pad_id is not None and (isinstance(pad_id, bool) or not isinstance(pad_id, numbers.Integral)):
            raise ValueError(f"`pad_id` must be an integer, or None to ignore no label. Received: pad_id={pad_id!r}")
        # Not the global float type: Keras casts the labels to the dtype of the loss, and half precision knows no
        # token id past 256 (bfloat16) or 2048 (float16).
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.pad_id = None if pad_id is None else int(pad_id)

    def is_real(self, labels):
        if self.pad_id is None:
            return ops.ones_like(labels, dtype="bool")
        return ops.not_equal(labels, self.pad_id)

    def __call__(self, y_true, y_pred, sample_weight=None):
        labels = ops.cast(ops.convert_to_tensor(y_true), "int32")
        _check_shapes(labels, y_pred)
        weight = ops.cast(self.is_real(labels), "float32")  # [B, T]
        if sample_weight is not None:
            sample_weight = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
            one_a_sequence = (*labels.shape[:-1], 1)
            if not (_is_prefix(sample_weight.shape, labels.shape) or _is_prefix(sample_weight.shape, one_a_sequence)):
                raise ValueError(
                    "`sample_weight` must hold one weight a sequence (batch,) or one a token (batch, length); "
                    f"received shape {tuple(sample_weight.shape)} for labels of shape {tuple(labels.shape)}."
                )
            while len(sample_weight.shape) < len(labels.shape):
                sample_weight = ops.expand_dims(sample_weight, -1)
            weight = weight * sample_weight
        # Keras multiplies the mask of `y_pred` in, and divides by the sum of what is left.
        return super().__call__(labels, y_pred, weight)


@keras.saving.register_keras_serializable(package="keras_transformer")
class SmoothedCrossEntropy(_TokenLoss):
    """Cross-entropy of logits with label smoothing, averaged over the real tokens of a batch.

    Of each token's target distribution, the share `1 - label_smoothing` lies on the label and the rest is spread
    evenly over the whole vocabulary, label included, as
    [Szegedy et al., 2015](https://arxiv.org/abs/1512.00567) define it and "Attention Is All You Need" uses it. The
    value equals `keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=...)` on one-hot labels, but
    no one-hot array is built: the cross-entropy with such a target is
    `logsumexp(logits) - (1 - label_smoothing) * logits[label] - label_smoothing * mean(logits)`.

    Positions whose label is `pad_id`, and those that the mask of the model's output leaves out, count neither in the
    sum nor in the number it is divided by. A batch without a real token gives 0. Half-precision logits are computed
    with in float32.

    Args:
        label_smoothing: Float in [0, 1), share of the target that is spread evenly over the vocabulary.
        pad_id: Integer or `None`, the label to ignore. It need not be a valid token: -100 works as well. `None`
            ignores no label.
        name: String, name of the loss.

    Call arguments:
        y_true: Integer tensor of shape `(batch, length)`, the labels.
        y_pred: Float tensor of shape `(batch, length, vocabulary)`, the logits.
        sample_weight: Optional tensor of shape `(batch,)`, one weight a sequence, or `(batch, length)`, one a token.
            The result is the weighted mean: the sum of weight times loss over the sum of the weights.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If an argument is out of range, or the shapes do not belong together.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.training import SmoothedCrossEntropy
    >>> loss = SmoothedCrossEntropy(label_smoothing=0.0)
    >>> logits = np.log([[[0.25, 0.25, 0.5], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]])
    >>> print(f"{float(loss(np.array([[2, 1, 0]]), logits)):.4f}")  # -(log 0.5 + log 0.8) / 2; the third is padding
    0.4581
    """

    def __init__(self, label_smoothing=0.1, pad_id=0, name="smoothed_cross_entropy"):
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"`label_smoothing` must lie in [0, 1); 0.1 is usual. Received: label_smoothing={label_smoothing}"
            )
        super().__init__(pad_id, name, reduction="mean_with_sample_weight")
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        labels = ops.cast(y_true, "int32")
        real = self.is_real(labels)
        values = _smoothed_cross_entropy(ops.where(real, labels, 0), ops.cast(y_pred, "float32"), self.label_smoothing)
        return ops.where(real, values, 0.0)

    def get_config(self):
        return {"label_smoothing": self.label_smoothing, "pad_id": self.pad_id, "name": self.name}


def _smoothed_cross_entropy(labels, logits, smoothing):
    """Cross-entropy of `logits` [B, T, V] with smoothed `labels` [B, T]: [B, T]."""
    if keras.backend.backend() == "tensorflow":
        return _fused_smoothed_cross_entropy(labels, logits, smoothing)
    if keras.backend.backend() == "jax":
        return _recomputed_smoothed_cross_entropy(labels, logits, smoothing)
    return _values_and_log_sum(labels, logits, smoothing)[0]


def _values_and_log_sum(labels, logits, smoothing):
    label_logits = ops.squeeze(ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1), axis=-1)
    log_sum = ops.logsumexp(logits, axis=-1)
    values = log_sum - (1.0 - smoothing) * label_logits
    return values - smoothing * ops.mean(logits, axis=-1) if smoothing else values, log_sum


def _fused_smoothed_cross_entropy(labels, logits, smoothing):
    """The same on TensorFlow, whose own gradient of a lookup in the logits takes longer than all the rest of the loss.

    Here one operation gives the cross-entropy and its gradient `softmax - one_hot`; what smoothing adds to them,
    `smoothing * (logits[label] - mean(logits))` and `smoothing * (one_hot - 1 / V)`, is put in by hand.
    """
    import tensorflow as tf

    shape, size = tf.shape(labels), tf.shape(logits)[-1]
    labels = tf.reshape(labels, [-1])
    places = tf.stack([tf.range(tf.size(labels)), labels], axis=-1)  # [B * T, 2]

    @tf.custom_gradient
    def values_of(rows):
        values, slopes = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=rows, labels=labels)
        if smoothing:
            values += smoothing * (tf.gather_nd(rows, places) - tf.reduce_mean(rows, axis=-1))

        def gradient(upstream):
            result = (slopes - smoothing / tf.cast(size, "float32")) * upstream[:, None]
            return tf.tensor_scatter_nd_add(result, places, smoothing * upstream) if smoothing else result

        return values, gradient

    return tf.reshape(values_of(tf.reshape(logits, [-1, size])), shape)


def _recomputed_smoothed_cross_entropy(labels, logits, smoothing):
    """The same on JAX, with a gradient that is one pass over the logits.

    JAX's own keeps the exponentials of all logits, and makes an array of zeros of their size for the lookup's.
    """
    import jax

    def forward(labels, logits):
        values, log_sum = _values_and_log_sum(labels, logits, smoothing)
        return values, (labels, logits, log_sum)

    def backward(kept, upstream):
        labels, logits, log_sum = kept
        is_label = ops.arange(logits.shape[-1], dtype="int32") == ops.expand_dims(labels, -1)
        target = ops.where(is_label, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
        slopes = ops.exp(logits - ops.expand_dims(log_sum, -1)) - target
        return None, slopes * ops.expand_dims(upstream, -1)

    values_of = jax.custom_vjp(lambda labels, logits: forward(labels, logits)[0])
    values_of.defvjp(forward, backward)
    return values_of(labels, logits)


def _is_prefix(shape, whole):
    """Whether `shape` is the beginning of `whole`, as far as both are known when the graph is built."""
    if len(shape) > len(whole):
        return False
    return all(a is None or b is None or a == b for a, b in zip(shape, whole, strict=False))


def _check_shapes(labels, logits):
    label_shape, logit_shape = tuple(labels.shape), tuple(logits.shape)
    if len(logit_shape) != len(label_shape) + 1 or not _is_prefix(label_shape, logit_shape):
        raise ValueError(
            "`y_pred` must be logits of shape (batch, length, vocabulary) for labels `y_true` of shape "
            f"(batch, length); received y_pred of shape {logit_shape} and y_true of shape {label_shape}."
        )
