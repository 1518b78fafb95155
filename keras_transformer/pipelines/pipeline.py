"""Text to text: tokenizers, a model and its generator as one thing to call, save and export."""

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path

import keras
import tensorflow as tf

from keras_transformer.generation import Generator
from keras_transformer.generation.constraints import end_tokens

PIPELINE_FILES = {"model.keras", "pipeline.json", "tokenizer", "source", "target"}
SAVED_MODEL_FILES = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}


class Pipeline:
    """Turns sentences into sentences: tokenizes, generates, detokenizes.

    An encoder-decoder (a model with the input `source_ids`) reads the source's tokens and an end. A decoder-only
    model (with the input `token_ids`) reads the source's tokens, after the generator's `start_id` if it has one, as
    a prompt to continue; only what it adds is returned. Sentences are never cut: a model that cannot read one because
    of its length raises.

    With the TensorFlow backend, `predict` and the SavedModel of `export` run one and the same graph. With the
    other backends, TensorFlow tokenizes on the CPU and the generator runs on the backend.

    Args:
        generator: `keras_transformer.generation.Generator` around the model.
        source: keras-nlp tokenizer of what the model reads.
        target: keras-nlp tokenizer of what the model writes. It may be the one given as `source`.
        max_new_tokens: Integer. How many tokens may be generated for one sentence.

    Raises:
        ValueError: If the model has neither an input `source_ids` nor `token_ids`, if the generator of an
            encoder-decoder has no `end_id`, or `max_new_tokens` is not a positive integer.

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
        if "source_ids" in names:
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
        """Generates the text for each of a list of texts.

        Args:
            texts: List of strings.
            batch_size: Integer. How many texts to process at once. Texts of similar length share a batch.

        Returns:
            A list of strings, in the order of `texts`.

        Raises:
            ValueError: If `texts` is one string, or holds something that is not a string.
        """
        if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`texts` must be a list of strings; received {texts!r}.")
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        results = [""] * len(texts)
        for begin in range(0, len(texts), batch_size):
            chosen = longest_first[begin : begin + batch_size]
            for i, result in zip(chosen, self._predict_batch([texts[i] for i in chosen]), strict=True):
                results[i] = result.decode("utf-8", errors="replace")
        return results

    def _predict_batch(self, batch):
        text = tf.constant(batch, "string")
        if keras.backend.backend() == "tensorflow":
            return self._translate(text)["text"].numpy()
        inputs = {name: ids.numpy() for name, ids in self._encode(text).items()}
        return self._decode(self.generator.generate(inputs, self.max_new_tokens)).numpy()

    def save(self, directory):
        """Saves model, generator and tokenizers, to be read by `keras_transformer.pipelines.load`.

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
            "tokenizers": {name: keras.saving.serialize_keras_object(item) for name, item in tokenizers.items()},
            "max_new_tokens": self.max_new_tokens,
        }
        with written_at_once(directory, PIPELINE_FILES) as staging:
            self.generator.model.save(staging / "model.keras")
            for name, tokenizer in tokenizers.items():
                (staging / name).mkdir()
                tokenizer.save_assets(str(staging / name))
            (staging / "pipeline.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def export(self, directory):
        """Writes a SavedModel that takes strings and returns strings.

        Its signature `serving_default` takes `text`, a batch of strings of any size, and returns `text`, as many
        strings. A process that loads it needs `tensorflow` and `tensorflow_text`, whose import registers the
        tokenizers' operations, and nothing of Keras:

        ```python
        import tensorflow as tf
        import tensorflow_text

        translate = tf.saved_model.load("saved_model").signatures["serving_default"]
        translate(text=tf.constant(["Good morning."]))["text"].numpy()
        ```

        Args:
            directory: String or path. An earlier SavedModel there is replaced.

        Raises:
            RuntimeError: If the backend is not TensorFlow.
            FileExistsError: If the directory holds something else than a SavedModel.
        """
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "`export` writes a TensorFlow graph and needs the TensorFlow backend; the backend is "
                f"{keras.backend.backend()}. Save the pipeline with `save`, and load and export it in a process with "
                "KERAS_BACKEND=tensorflow."
            )
        module = tf.Module()
        # A SavedModel keeps the variables and tables that it can reach from its root.
        module.model, module.source, module.target = self.generator.model, self.source, self.target
        module.translate = self._translate
        with written_at_once(directory, SAVED_MODEL_FILES) as staging:
            tf.saved_model.save(module, staging, signatures={"serving_default": self._translate})


def load(directory):
    """Loads a pipeline from the directory that `Pipeline.save` wrote, in any process and on any backend.

    Args:
        directory: String or path.

    Returns:
        A `Pipeline` that gives the same strings as the saved one. Its model is not compiled for training.

    Raises:
        FileNotFoundError: If there is no saved pipeline in the directory.

    Example:

    >>> import tempfile
    >>> from keras_transformer.generation import Generator
    >>> from keras_transformer.pipelines import train_subwords
    >>> tokenizer = train_subwords(["ein spiel@@ haus"])
    >>> model = kt.models.transformer(7, 7, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> pipeline = Pipeline(Generator(model, start_id=1, end_id=2), tokenizer, tokenizer, max_new_tokens=4)
    >>> directory = tempfile.mkdtemp()
    >>> pipeline.save(directory)
    >>> load(directory).predict(["ein haus"]) == pipeline.predict(["ein haus"])
    True
    """
    directory = Path(directory)
    if not (directory / "pipeline.json").is_file():
        raise FileNotFoundError(f"`directory` must hold a saved pipeline; there is no {directory / 'pipeline.json'}.")
    config = json.loads((directory / "pipeline.json").read_text(encoding="utf-8"))
    tokenizers = {}
    for name, tokenizer in config["tokenizers"].items():
        tokenizers[name] = keras.saving.deserialize_keras_object(tokenizer)
        tokenizers[name].load_assets(str(directory / name))
    model = keras.saving.load_model(directory / "model.keras", compile=False)
    return Pipeline(
        Generator.from_config(model, config["generator"]),
        tokenizers.get("tokenizer") or tokenizers["source"],
        tokenizers.get("tokenizer") or tokenizers["target"],
        config["max_new_tokens"],
    )


@contextlib.contextmanager
def written_at_once(directory, own_files):
    """Yields a new directory beside `directory` that takes its place when the block has ended without an error."""
    directory = Path(os.path.abspath(directory))
    if directory.exists():
        others = sorted({path.name for path in directory.iterdir()} - own_files) if directory.is_dir() else ["a file"]
        if others:
            raise FileExistsError(
                f"`directory` must be new, empty or the earlier result of the same method; received {directory}, "
                f"which holds {', '.join(others[:10])}."
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        if directory.exists():
            earlier = staging.with_name(f"{staging.name}.earlier")
            directory.rename(earlier)
            staging.rename(directory)
            shutil.rmtree(earlier)
        else:
            staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
