"""What attention does while a model learns, for TensorBoard."""

import keras
import numpy as np
from keras import ops

from keras_transformer import scopes
from keras_transformer.training.gradients import gradients


class AttentionImages(keras.callbacks.Callback):
    """Writes for TensorBoard each head's attention map, the likeliest answers for a token, and norms of gradients.

    The model runs on the same few inputs again and again, beside training and outside of its compiled step; only the
    first row is shown. Maps are images `attention/{layer}`, one for each head, from 0 (black) to 1; answers are the
    text `answers`; norms, one for each layer with weights, are the scalars `gradient_norm/{layer}`. TensorFlow, which
    writes the files, must be installed, whatever the backend.

    Args:
        log_dir: str or path of the directory to write into.
        inputs: what the model takes: a batch of one row or a few.
        targets: what its loss takes for these inputs, for the norms; None for none.
        every: `"epoch"`, or int: number of training steps from one writing to the next.
        token: int. Position whose likeliest answers are written.
        names: list of the names of the answers, or None for their numbers.

    Raises:
        ValueError: if `every` is neither, or the model has no attention of this library.

    Example:

    >>> import pathlib, tempfile, numpy as np, keras_transformer as kt
    >>> log_dir = pathlib.Path(tempfile.mkdtemp())
    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> model.compile("adam", kt.training.SmoothedCrossEntropy())
    >>> ids = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    >>> callback = kt.training.AttentionImages(log_dir, ids[:1], ids[:1])
    >>> _ = model.fit(ids, ids, epochs=2, verbose=0, callbacks=[callback])
    >>> len(list(log_dir.glob("*tfevents*")))
    1
    """

    def __init__(self, log_dir, inputs, targets=None, every="epoch", token=-1, names=None):
        super().__init__()
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` must be 'epoch' or a number of steps, 1 or more; received every={every!r}.")
        self.log_dir = str(log_dir)
        self.inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        self.targets = targets
        self.every = every
        self.token = token
        self.names = names
        self._writer = None
        self._steps = 0

    def on_train_begin(self, logs=None):
        import tensorflow as tf

        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        if self.every != "epoch" and self._steps % self.every == 0:
            self.write(self._steps)

    def on_epoch_end(self, epoch, logs=None):
        if self.every == "epoch":
            self.write(epoch)

    def on_train_end(self, logs=None):
        self._writer.close()

    def write(self, step):
        """Writes what the model does now as that of `step`."""
        import tensorflow as tf

        with scopes.RecordingScope(["weights"]) as scope:
            outputs = self.model(self.inputs, training=False)
        if not scope.records:
            raise ValueError(
                "`AttentionImages` needs a model with `MultiHeadSelfAttention` or `CrossAttention`; received "
                f"{self.model.name!r}, which called none."
            )
        with self._writer.as_default():
            for path, weights in scope.records.items():
                maps = enlarged(ops.convert_to_numpy(ops.cast(weights[0], "float32")))
                place = path.removesuffix("/weights")
                tf.summary.image(f"attention/{place}", maps[..., None], step, max_outputs=len(maps))
            tf.summary.text("answers", self._answers(outputs), step)
            for name, norm in self._norms().items():
                tf.summary.scalar(f"gradient_norm/{name}", norm, step)
        self._writer.flush()

    def _answers(self, outputs):
        """A table, in Markdown, of the five likeliest answers."""
        outputs = outputs.get("logits", next(iter(outputs.values()))) if isinstance(outputs, dict) else outputs
        scores = ops.cast(keras.tree.flatten(outputs)[0][0], "float32")
        shares = ops.convert_to_numpy(ops.softmax(scores[self.token] if len(scores.shape) == 2 else scores))
        best = np.argsort(-shares, kind="stable")[:5]
        rows = [f"| {i if self.names is None else self.names[i]} | {shares[i]:.4f} |" for i in best]
        return "\n".join(["| answer | share |", "| --- | --- |", *rows])

    def _norms(self):
        """The norm of the gradient of each layer's weights."""
        if self.targets is None:
            return {}
        squares = {}
        found = gradients(self.model, self.inputs, self.targets)
        for variable, gradient in zip(self.model.trainable_variables, found, strict=True):
            if gradient is not None:
                name = variable.path.split("/")[0]
                squares[name] = squares.get(name, 0.0) + float(np.sum(np.square(gradient, dtype="float64")))
        return {name: square**0.5 for name, square in squares.items()}


def enlarged(maps, edge=128):
    """Maps `[heads, T, S]` whose cells are squares large enough to see."""
    times = max(1, edge // max(maps.shape[1:]))
    return np.clip(maps.repeat(times, axis=1).repeat(times, axis=2), 0, 1)
