"""Raw input to a label: what reads it, a model and the names of its classes as one thing to call, save and export."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_transformer.pipelines.answers import BestLabel
from keras_transformer.pipelines.pipeline import is_reader
from keras_transformer.pipelines.saving import (
    MODEL_FILE,
    PIPELINE_FILE,
    check_exportable,
    save_graph,
    save_part,
    write_config,
    written_at_once,
)
from keras_transformer.pipelines.token_reader import TokenReader


class Classifier:
    """Tells of which class a text, an image or a sound is.

    Args:
        model: `keras.Model` from what the source gives to logits `[B, classes]`.
        source: what reads raw inputs: a reader, such as `TokenReader` or `ImageReader`, or a keras-nlp tokenizer, which
            stands for a `TokenReader`.
        labels: strings, the names of the classes in the order of the logits.

    Raises:
        ValueError: if the model has another number of classes.

    Example:

    >>> from keras_transformer.pipelines import Classifier, train_subwords
    >>> tokenizer = train_subwords(["ein haus", "a house"])
    >>> model = kt.models.text_classifier(tokenizer.vocabulary_size(), 2, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> classifier = Classifier(model, tokenizer, ["German", "English"])
    >>> classifier.predict(["ein haus"])[0] in classifier.labels
    True
    >>> classifier.probabilities(["ein haus", "a house"]).shape
    (2, 2)
    """

    def __init__(self, model, source, labels):
        self.source = source if is_reader(source) else TokenReader(source)
        self._answer = BestLabel(model, labels)

    @property
    def model(self):
        return self._answer.model

    @property
    def labels(self):
        return self._answer.labels

    def predict(self, raw_inputs, batch_size=64):
        """The label of each of a list of raw inputs.

        Args:
            raw_inputs: list of what the source takes: strings, images or sounds.
            batch_size: int. How many of them to process at once.

        Returns:
            List of str, in the order of `raw_inputs`.

        Raises:
            ValueError: if `raw_inputs` is no list, or one of them cannot be read.
        """
        return [self.labels[i] for i in self.probabilities(raw_inputs, batch_size).argmax(axis=-1)]

    def probabilities(self, raw_inputs, batch_size=64):
        """The probability of each class for each of a list of raw inputs.

        Args:
            raw_inputs: list of what the source takes.
            batch_size: int. How many of them to process at once.

        Returns:
            Array float32 `[raw inputs, classes]`.

        Raises:
            ValueError: if `raw_inputs` is no list, or one of them cannot be read.
        """
        if isinstance(raw_inputs, str | bytes) or not hasattr(raw_inputs, "__len__"):
            raise ValueError(f"`raw_inputs` must be a list of raw inputs; received {raw_inputs!r}.")
        batches = [np.zeros((0, len(self.labels)), "float32")]
        for begin in range(0, len(raw_inputs), batch_size):
            inputs = self.source(list(raw_inputs[begin : begin + batch_size]))
            batches.append(ops.convert_to_numpy(self._probabilities(inputs)))
        return np.concatenate(batches)

    def _probabilities(self, inputs):
        tensors = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
        # As the model was built: one input, a list or a dict of them. Keras warns of others.
        tensors = keras.tree.map_structure(lambda x: tensors[x.name], self.model.input)
        return ops.softmax(ops.cast(self.model(tensors, training=False), "float32"))

    def save(self, directory):
        """Saves model, source and labels, to be read by `keras_transformer.pipelines.load`.

        The directory may be moved anywhere. It appears when all is written; an earlier saved classifier is replaced.

        Args:
            directory: str or path.

        Raises:
            FileExistsError: if the directory holds something else than a saved classifier.
        """
        with written_at_once(directory, {MODEL_FILE, PIPELINE_FILE, "source"}) as staging:
            self.model.save(staging / MODEL_FILE)
            config = {"source": save_part(self.source, staging / "source"), "labels": self.labels}
            write_config(config, staging)

    def export(self, directory):
        """Writes a SavedModel from raw inputs to labels.

        Its signature `serving_default` takes a batch of any size of what the source reads: `text`, strings; `images`,
        uint8 `[batch, height, width, channels]` of one size; or `sounds`, floats `[batch, samples]`. It returns
        `label`, strings, and `probabilities`, floats `[batch, classes]`. A process that loads it needs `tensorflow`,
        for texts also `tensorflow_text`, whose import registers the operations of tokenizers, and nothing of Keras.

        Args:
            directory: str or path. An earlier SavedModel there is replaced.

        Raises:
            RuntimeError: if the backend is not TensorFlow.
            FileExistsError: if the directory holds something else than a SavedModel.
        """
        check_exportable("Save the classifier with `save`, and load and export it")
        read = self.source.in_graph(self.model)

        def classify(*raw_inputs):
            probabilities = self._probabilities(read(*raw_inputs))
            label = tf.gather(tf.constant(self.labels), tf.argmax(probabilities, axis=-1))
            return {"label": label, "probabilities": probabilities}

        module = tf.Module()
        # A SavedModel keeps the variables and tables that it can reach from its root.
        module.model, module.read = self.model, read
        module.classify = tf.function(classify, input_signature=read.signature, autograph=False)
        save_graph(module, directory, {"serving_default": module.classify})
