"""The loss of sequences that are not aligned with their labels."""

import keras
from keras import ops

from keras_transformer.ops.masks import SURELY_NOT, get_mask, surely_blank


@keras.saving.register_keras_serializable(package="keras_transformer")
class CTCLoss(keras.losses.Loss):
    """Connectionist temporal classification, averaged over the labels of a batch.

    The loss of a sequence is the negative logarithm of the probability that its frames spell its labels, whatever the
    alignment: each frame says a label or the blank, and labels that follow each other on the same frames count once.
    The sum of these losses is divided by the number of labels, so that it can be added to a cross-entropy of tokens.

    A sequence that has no label, or fewer frames than its labels need (one for each, and one more between two that are
    equal), has no alignment: it counts neither in the sum nor in the number that it is divided by. `fits` tells which.

    Args:
        blank_id: Integer, the token that stands for no label, which also fills up rows of labels.
        name: String, name of the loss.

    Call arguments:
        y_true: Integer tensor of shape `(batch, length)`, the labels, filled up behind with `blank_id`.
        y_pred: Float tensor of shape `(batch, frames, vocabulary)`, the logits. Frames that their mask leaves out, or
            whose logits are -10,000 for all but a blank of 0, do not count: they are padding.
        sample_weight: Optional tensor of shape `(batch,)`, one weight a sequence.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If the shapes do not belong together.

    Reference: [Connectionist Temporal Classification](https://www.cs.toronto.edu/~graves/icml_2006.pdf), section 4.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.training import CTCLoss
    >>> logits = np.log([[[0.5, 0.5], [0.2, 0.8]]])  # blank and 1, in two frames
    >>> print(f"{float(CTCLoss()(np.array([[1]]), logits)):.4f}")  # -log(0.5 * 0.2 + 0.5 * 0.8 + 0.5 * 0.8)
    0.1054
    """

    def __init__(self, blank_id=0, name="ctc_loss"):
        super().__init__(name=name, reduction="mean_with_sample_weight", dtype="float32")
        self.blank_id = blank_id

    def __call__(self, y_true, y_pred, sample_weight=None):
        labels = ops.cast(ops.convert_to_tensor(y_true), "int32")
        if len(labels.shape) != 2 or len(y_pred.shape) != 3:
            raise ValueError(
                "`y_pred` must be logits of shape (batch, frames, vocabulary) for labels `y_true` of shape (batch, "
                f"length); received y_pred of shape {tuple(y_pred.shape)} and y_true of shape {tuple(labels.shape)}."
            )
        mask = get_mask(y_pred)
        logits = ops.log_softmax(ops.cast(ops.convert_to_tensor(y_pred), "float32"), axis=-1)
        if mask is not None:
            logits = ops.where(ops.expand_dims(mask, -1), logits, surely_blank(logits.shape[-1], self.blank_id))
        weight = ops.where(fits(labels, _real_frames(logits), self.blank_id), self._counts(labels), 0)
        weight = ops.cast(weight, "float32")
        if sample_weight is not None:
            weight = weight * ops.cast(ops.convert_to_tensor(sample_weight), "float32")
        return super().__call__(labels, logits, weight)

    def call(self, y_true, y_pred):
        labels = ops.cast(y_true, "int32")
        fit = fits(labels, _real_frames(y_pred), self.blank_id)
        # Where nothing fits, one label is put in place of them, whose loss has no weight.
        first = ops.arange(ops.shape(labels)[1]) == 0
        labels = ops.where(ops.expand_dims(fit, -1), labels, ops.where(first, (self.blank_id == 0) * 1, self.blank_id))
        counts = self._counts(labels)
        return _losses(labels, y_pred, counts, self.blank_id) / ops.cast(counts, "float32")

    def _counts(self, labels):
        return ops.sum(ops.cast(ops.not_equal(labels, self.blank_id), "int32"), axis=-1)

    def get_config(self):
        return {"blank_id": self.blank_id, "name": self.name}


def _real_frames(logits):
    """How many frames of each sequence are not padding, which is sure to be blank: `[B]`."""
    return ops.sum(ops.cast(ops.min(logits, axis=-1) > SURELY_NOT / 2, "int32"), axis=-1)


def fits(labels, frames, blank_id=0):
    """Which rows of labels can be aligned with so many frames.

    Args:
        labels: integer tensor of shape `[B, L]`, filled up behind with `blank_id`.
        frames: int, or tensor of shape `[B]`.
        blank_id: int.

    Returns:
        Boolean tensor of shape `[B]`: whether there is a label, a frame for each, and one more between two that are
        equal.
    """
    real = ops.not_equal(labels, blank_id)
    repeated = ops.logical_and(real[:, 1:], ops.equal(labels[:, 1:], labels[:, :-1]))
    needed = ops.sum(ops.cast(real, "int32"), axis=-1) + ops.sum(ops.cast(repeated, "int32"), axis=-1)
    return ops.logical_and(needed > 0, needed <= frames)


def _losses(labels, logits, counts, blank_id):
    """The loss of each sequence, `[B]`."""
    frames = ops.full((ops.shape(logits)[0],), ops.shape(logits)[1], dtype="int32")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # TensorFlow takes dense labels through a scan, which lasts ten times as long on a CPU as its kernel.
        if not tf.config.list_physical_devices("GPU"):
            sparse = tf.sparse.from_dense(tf.where(labels == blank_id, 0, labels + 1))
            sparse = tf.SparseTensor(sparse.indices, sparse.values - 1, sparse.dense_shape)
            options = {"logits_time_major": False, "blank_index": blank_id}
            return tf.nn.ctc_loss(sparse, logits, None, frames, **options)
    return ops.ctc_loss(labels, logits, counts, frames, mask_index=blank_id)
