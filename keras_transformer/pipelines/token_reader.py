"""Texts as padded rows of the ids of a keras-nlp tokenizer."""

import keras
import tensorflow as tf

from keras_transformer.pipelines.readers import check_texts

KEPT = ("first", "last")


@keras.saving.register_keras_serializable(package="keras_transformer")
class TokenReader:
    """Reads texts as the ids of their tokens, padded with 0 to the longest one.

    Args:
        tokenizer: keras-nlp tokenizer, or a layer with its methods `tokenize`, `save_assets` and `load_assets`.
        input_name: str. The input of the model that the ids go to.
        max_length: int. Of a longer text only so many tokens are read; None for all of them.
        keep: `"first"` or `"last"`: which tokens of a text that is too long.

    Call arguments:
        texts: list of strings.

    Returns:
        Dict of an array int32 `[texts, length]`.

    Raises:
        ValueError: if an argument is out of range, something is not a string, or a text has no token.

    Example:

    >>> from keras_transformer.pipelines import TokenReader, train_subwords
    >>> read = TokenReader(train_subwords(["ein spiel@@ haus"]), max_length=2, keep="last")
    >>> read(["ein spiel@@ haus", "ein"])["token_ids"].tolist()
    [[6, 5], [4, 0]]
    """

    def __init__(self, tokenizer, input_name="token_ids", max_length=None, keep="first"):
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be a positive number of tokens; received max_length={max_length}.")
        if keep not in KEPT:
            raise ValueError(f"`keep` must be one of {KEPT}; received keep={keep!r}.")
        self.tokenizer = tokenizer
        self.input_name = input_name
        self.max_length = max_length
        self.keep = keep
        self._ragged = tf.function(self.ragged, input_signature=[tf.TensorSpec([None], "string")], autograph=False)

    def __call__(self, texts):
        rows = self._checked(texts)
        return {self.input_name: rows.to_tensor(0).numpy()}

    def rows(self, texts):
        """The ids of each text, as a list of lists."""
        return self._checked(texts).to_list()

    def in_graph(self, model, pad_id=0):
        """What reads tensors of strings in a TensorFlow graph."""
        return _GraphTokens(self)

    def ragged(self, texts):
        """The ids of a tensor of strings, ragged int32 `[texts, length]`."""
        rows = tf.cast(self.tokenizer.tokenize(texts), "int32")
        if self.max_length is None:
            return rows
        return rows[:, : self.max_length] if self.keep == "first" else rows[:, -self.max_length :]

    def _checked(self, texts):
        check_texts(texts)
        rows = self._ragged(tf.constant(list(texts), "string"))
        lengths = rows.row_lengths().numpy()
        if len(lengths) and not lengths.min():
            raise ValueError(
                f"A text must have a token; number {lengths.argmin()} has none: {texts[lengths.argmin()]!r}."
            )
        return rows

    def save_assets(self, directory):
        """Writes the files of the tokenizer into a directory."""
        self.tokenizer.save_assets(directory)

    def load_assets(self, directory):
        """Reads what `save_assets` has written."""
        self.tokenizer.load_assets(directory)

    def get_config(self):
        return {
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "input_name": self.input_name,
            "max_length": self.max_length,
            "keep": self.keep,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "tokenizer": keras.saving.deserialize_keras_object(config["tokenizer"])})


class _GraphTokens(tf.Module):
    """A `TokenReader` inside of a TensorFlow graph."""

    signature = [tf.TensorSpec([None], "string", name="text")]

    def __init__(self, reader):
        super().__init__()
        self.tokenizer = reader.tokenizer  # A SavedModel keeps the tables that it can reach.
        self._ragged, self._input_name = reader.ragged, reader.input_name

    def __call__(self, text):
        rows = self._ragged(text)
        check = tf.debugging.assert_positive(rows.row_lengths(), "A text must have a token.")
        with tf.control_dependencies([check] if check is not None else []):
            return {self._input_name: rows.to_tensor(0)}
