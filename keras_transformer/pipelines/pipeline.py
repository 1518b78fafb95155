"""Raw input to text: what reads it, a generator and a tokenizer as one thing to call, save and export."""

import keras
import tensorflow as tf

from keras_transformer.generation import Sampling
from keras_transformer.generation.constraints import end_tokens
from keras_transformer.pipelines.explanation import explained
from keras_transformer.pipelines.sampling import sampled
from keras_transformer.pipelines.saving import (
    MODEL_FILE,
    PIPELINE_FILES,
    check_exportable,
    save_graph,
    save_part,
    write_config,
    written_at_once,
)


class Pipeline:
    """Turns sentences, images or sounds into sentences: reads them, generates tokens, detokenizes.

    An encoder-decoder (a model with the input `source_ids`) reads the source's tokens and an end. A decoder-only
    model (with the input `token_ids`) reads the source's tokens, after the generator's `start_id` if it has one, as
    a prompt to continue; only what it adds is returned. Sentences are never cut: a model that cannot read one because
    of its length raises.

    With the TensorFlow backend, `predict` and the SavedModel of `export` run one and the same graph. With the
    other backends, TensorFlow tokenizes on the CPU and the generator runs on the backend.

    Args:
        generator: `keras_transformer.generation.Generator` around the model, or `AttentionRescoring`.
        source: keras-nlp tokenizer of what the model reads; or a reader, such as `ImageReader`, of raw inputs that
            are no texts.
        target: keras-nlp tokenizer of what the model writes. It may be the one given as `source`.
        max_new_tokens: Integer. How many tokens may be generated for one sentence.

    Raises:
        ValueError: If there is no reader and the model has neither an input `source_ids` nor `token_ids`, if the
            generator of an encoder-decoder has no `end_id`, or `max_new_tokens` is not a positive integer.

    Example:

    >>> from keras_transformer.generation import Generator
    >>> from keras_transformer.pipelines import train_subwords
    >>> tokenizer = train_subwords(["ein spiel@@ haus", "a play@@ house"])
    >>> size = tokenizer.vocabulary_size()
    >>> model = kt.models.transformer(size, size, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> generator = Generator(model, start_id=1, end_id=2)
    >>> pipeline = Pipeline(generator, tokenizer, tokenizer, max_new_tokens=8)
    >>> len(pipeline.predict(["ein haus", ""]))
    2
    """

    def __init__(self, generator, source, target, max_new_tokens=128):
        names = [tensor.name for tensor in generator.model.inputs]
        self.has_reader = is_reader(source)
        if self.has_reader:
            self.input_name = None
        elif "source_ids" in names:
            self.input_name = "source_ids"
        elif "token_ids" in names:
            self.input_name = "token_ids"
        else:
            raise ValueError(
                "`generator` must hold a model with an input named `source_ids` (encoder-decoder) or `token_ids` "
                f"(decoder-only); received a model with the inputs {names}."
            )
        if self.input_name == "source_ids" and generator.end_id is None:
            raise ValueError("`generator` must have an `end_id` to end the source with; received `end_id=None`.")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a positive integer; received {max_new_tokens!r}.")
        self.generator = generator
        self.source = source
        self.target = target
        self.max_new_tokens = max_new_tokens
        if not self.has_reader:
            text = tf.TensorSpec([None], "string", name="text")
            self._translate = tf.function(self._translate_in_graph, input_signature=[text], autograph=False)
            self._encode = tf.function(self._encode_in_graph, input_signature=[text], autograph=False)
        ids = tf.TensorSpec([None, None], "int32")
        self._decode = tf.function(self._decode_in_graph, input_signature=[ids], autograph=False)

    def _encode_in_graph(self, text):
        ids = tf.cast(self.source.tokenize(text), "int32")  # ragged [B, S]
        if self.input_name == "source_ids":
            ends = tf.fill([tf.shape(text)[0], 1], end_tokens(self.generator.end_id)[0])
            ids = tf.concat([ids, tf.RaggedTensor.from_tensor(ends)], axis=1)
        elif self.generator.start_id is not None:
            starts = tf.fill([tf.shape(text)[0], 1], self.generator.start_id)
            ids = tf.concat([tf.RaggedTensor.from_tensor(starts), ids], axis=1)
        else:
            message = "A prompt must hold at least one token, as the generator has no `start_id`."
            tf.debugging.assert_positive(ids.row_lengths(), message)
        return {self.input_name: ids.to_tensor(self.generator.pad_id)}  # [B, S]

    def _decode_in_graph(self, ids):
        real = tf.ones_like(ids, "bool")
        for special in (self.generator.pad_id, self.generator.start_id, *end_tokens(self.generator.end_id)):
            if special is not None:
                real &= ids != special
        return self.target.detokenize(tf.ragged.boolean_mask(ids, real))  # [B]

    def _translate_in_graph(self, text):
        ids = self.generator.generate_tensors(self._encode_in_graph(text), self.max_new_tokens)
        return {"text": self._decode_in_graph(ids)}

    def predict(self, texts, batch_size=64):
        """Generates the text for each of a list of texts, or of what the reader takes.

        Args:
            texts: List of strings; with a reader, list of its raw inputs.
            batch_size: Integer. How many to process at once. Texts of similar length share a batch.

        Returns:
            A list of strings, in the order of `texts`.

        Raises:
            ValueError: If `texts` is one string, or holds something that is not a string or that the reader refuses.
        """
        order = range(len(texts))
        if not self.has_reader:
            if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"`texts` must be a list of strings; received {texts!r}.")
            order = sorted(order, key=lambda i: -len(texts[i]))  # The longest first.
        results = [""] * len(texts)
        for begin in range(0, len(texts), batch_size):
            chosen = order[begin : begin + batch_size]
            for i, result in zip(chosen, self._predict_batch([texts[i] for i in chosen]), strict=True):
                results[i] = result.decode("utf-8", errors="replace")
        return results

    def _predict_batch(self, batch):
        if self.has_reader:
            return self._decode(self.generator.generate(self.source(batch), self.max_new_tokens)).numpy()
        text = tf.constant(batch, "string")
        if keras.backend.backend() == "tensorflow":
            return self._translate(text)["text"].numpy()
        inputs = {name: ids.numpy() for name, ids in self._encode(text).items()}
        return self._decode(self.generator.generate(inputs, self.max_new_tokens)).numpy()

    def save(self, directory):
        """Saves model, generator, tokenizers and reader, to be read by `keras_transformer.pipelines.load`.

        The directory holds `model.keras`, `pipeline.json` and the files of the tokenizers, and may be moved anywhere.
        It appears when all is written. An earlier saved pipeline is replaced.

        Args:
            directory: String or path.

        Raises:
            FileExistsError: If the directory holds something else than a saved pipeline.
        """
        tokenizers = {"tokenizer": self.source}
        if self.target is not self.source:
            tokenizers = {"source": self.source, "target": self.target}
        config = {
            "generator": self.generator.get_config(),
            "max_new_tokens": self.max_new_tokens,
        }
        with written_at_once(directory, PIPELINE_FILES) as staging:
            self.generator.model.save(staging / MODEL_FILE)
            config["tokenizers"] = {name: save_part(part, staging / name) for name, part in tokenizers.items()}
            write_config(config, staging)

    def export(self, directory):
        """Writes a SavedModel that takes strings and returns strings.

        Its signature `serving_default` takes `text`, a batch of strings of any size, and returns `text`, as many
        strings. With a reader, it takes what that reads: `images`, uint8 `[batch, height, width, channels]` of one
        size, or `sounds`, floats `[batch, samples]` filled up with zeros. A process that loads it needs `tensorflow`
        and `tensorflow_text`, whose import registers the tokenizers' operations, and nothing of Keras:

        ```python
        import tensorflow as tf
        import tensorflow_text

        translate = tf.saved_model.load("saved_model").signatures["serving_default"]
        translate(text=tf.constant(["Good morning."]))["text"].numpy()
        ```

        Where an encoder reads the texts, a second signature `attention` says besides what the decoder looked at. It
        returns `text`; `source_tokens` `[batch, S]` and `target_tokens` `[batch, T]`, the end included and filled up
        with empty strings; and `attention`, float32 `[batch, layers, heads, T, S]`, the weights that each token was
        written with.

        Where the generator samples, a signature `sample` takes besides what the sampler has as its own: scalars
        `temperature` float32, `top_k` int32 (0 for all), `top_p` float32 (1 for all), `seed` int32 (-1 for a new one)
        and `max_new_tokens` int32, of which the pipeline's own is the most. The function `sample` of the loaded
        SavedModel takes the same, and has the pipeline's own for what it is not given.

        The versions of this library and of Keras, and the format of the signatures, stand in
        `assets.extra/keras_transformer.json`.

        Args:
            directory: String or path. An earlier SavedModel there is replaced.

        Raises:
            RuntimeError: If the backend is not TensorFlow.
            FileExistsError: If the directory holds something else than a SavedModel.
        """
        check_exportable("Save the pipeline with `save`, and load and export it")
        module = tf.Module()
        # A SavedModel keeps the variables and tables that it can reach from its root.
        module.model, module.target = self.generator.model, self.target
        if self.has_reader:
            module.source = read = self.source.in_graph(self.generator.model, self.generator.pad_id)
            module.translate, raw_inputs = self._answer_in_graph(read), read.signature
        else:
            module.source, module.translate = self.source, self._translate
            read, raw_inputs = self._encode_in_graph, self._translate.input_signature
        signatures = {"serving_default": module.translate}
        if isinstance(getattr(self.generator, "sampler", None), Sampling):
            signatures["sample"] = module.sample = sampled(self, read, raw_inputs)
        if self.input_name == "source_ids" and [*self.generator.graph.source_inputs] == ["source_ids"]:
            signatures["attention"] = module.explain = explained(self)
        save_graph(module, directory, signatures)

    def _answer_in_graph(self, read):
        def answer(*raw_inputs):
            ids = self.generator.generate_tensors(read(*raw_inputs), self.max_new_tokens)
            return {"text": self._decode_in_graph(ids)}

        return tf.function(answer, input_signature=read.signature, autograph=False)


def is_reader(source):
    """Whether a source reads raw inputs by itself, and is no tokenizer."""
    return hasattr(source, "in_graph")
