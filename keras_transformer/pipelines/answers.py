"""From what a model reads to the text that it answers with.

An answer is called with a dict of the model's inputs, and returns a list of strings. Its method `in_graph` returns a
function that does the same with tensors inside of a TensorFlow graph.
"""

import re

import numpy as np
from keras import ops

TIME_STAMPS = re.compile(r"<\|\d+\.\d+\|>")


class GeneratedText:
    """Generates tokens and writes them as text.

    Args:
        generator: `keras_transformer.generation.Generator`.
        tokenizer: `tokenizers.Tokenizer`, or what has its method `decode_batch`.
        max_new_tokens: int. How many tokens may be generated for one text.

    Raises:
        ValueError: if `max_new_tokens` is not a positive integer.

    Example:

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["dogs", "run", "fast", "home"])}))
    >>> model = kt.models.transformer(4, 4, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> answer = GeneratedText(kt.generation.Generator(model, start_id=1), tokenizer, max_new_tokens=4)
    >>> len(answer({"source_ids": [[0, 1], [3]]}))
    2
    """

    def __init__(self, generator, tokenizer, max_new_tokens=128):
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a positive integer; received {max_new_tokens!r}.")
        self.generator = generator
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens

    def __call__(self, inputs):
        ids = self.generator.generate(inputs, self.max_new_tokens)
        texts = self.tokenizer.decode_batch([self._kept(row) for row in ids.tolist()])
        return [TIME_STAMPS.sub("", text) for text in texts] if "features" in inputs else texts

    @property
    def model(self):
        return self.generator.model

    @property
    def pad_id(self):
        return self.generator.pad_id

    def in_graph(self):
        import tensorflow as tf

        from keras_transformer.pipelines.graph_decoder import GraphDecoder

        decoder = GraphDecoder.of(self.tokenizer)

        def answer(inputs):
            ids = self.generator.generate_tensors(inputs, self.max_new_tokens)
            places = tf.where(ids != self.pad_id, tf.range(self.max_new_tokens), -1)
            texts = decoder(tf.RaggedTensor.from_tensor(ids, lengths=tf.reduce_max(places, axis=1) + 1))
            return tf.strings.regex_replace(texts, TIME_STAMPS.pattern, "") if "features" in inputs else texts

        return answer

    def _kept(self, row):
        """A row of generated ids without what fills it up behind its end."""
        while row and row[-1] == self.generator.pad_id:
            row.pop()
        return row


class BestLabel:
    """The label that a classifier finds likeliest.

    Args:
        model: `keras.Model` with the logits of labels `[B, labels]`, as its output or in it under `output`.
        labels: strings, one for each logit.
        given: dict of inputs that are the same in all calls.
        output: str. Where the logits stand in a dict of outputs, or None.

    Raises:
        ValueError: if the model has another number of labels.

    Example:

    >>> import numpy as np
    >>> inputs = keras.Input((2,), name="x")
    >>> answer = BestLabel(keras.Model({"x": inputs}, inputs * 3.0), ["cat", "dog"])
    >>> answer({"x": np.array([[0.1, 0.9], [1.0, 0.0]])})
    ['dog', 'cat']
    """

    pad_id = 0  # Of rows of ids, which are no matter here.

    def __init__(self, model, labels, given=None, output=None):
        self.model = model
        self.labels = list(labels)
        self.given = given or {}
        self.output = output
        count = self.logits_of(model.output).shape[-1]
        if count is not None and count != len(self.labels):
            raise ValueError(f"`labels` must be {count}, one for each logit of the model; received {self.labels}.")

    def __call__(self, inputs):
        return [self.labels[i] for i in np.asarray(ops.convert_to_numpy(self.indices(inputs)))]

    def in_graph(self):
        import tensorflow as tf

        return lambda inputs: tf.gather(tf.constant(self.labels), self.indices(inputs))

    def indices(self, inputs):
        """The number of the best label of each row."""
        tensors = {name: ops.convert_to_tensor(value) for name, value in {**inputs, **self.given}.items()}
        return ops.argmax(self.logits_of(self.model(tensors, training=False)), axis=-1)

    def logits_of(self, outputs):
        return outputs if self.output is None else outputs[self.output]
