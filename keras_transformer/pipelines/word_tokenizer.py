"""A tokenizer of whole words, which works inside a TensorFlow graph."""

import collections

import keras
import tensorflow as tf
import tensorflow_text

from keras_transformer.pipelines.tokenizers import SubwordTokenizer


def train_words(texts, vocabulary_size, punctuation=False):
    """Collects the most frequent words of texts.

    Args:
        texts: Iterable of strings.
        vocabulary_size: Integer. The largest number of words, the four special ones included.
        punctuation: Boolean. Whether marks such as `!` are words as well; otherwise they are left out.

    Returns:
        A `WordTokenizer`.

    Raises:
        ValueError: If there is no word, or `vocabulary_size` leaves no room for one.

    Example:

    >>> train_words(["It's a cat!", "A CAT?"], vocabulary_size=7).get_vocabulary()
    ['<pad>', '<start>', '<end>', '<unknown>', 'a', 'cat', "it's"]
    """
    special = WordTokenizer.SPECIAL
    if vocabulary_size <= len(special):
        raise ValueError(
            f"`vocabulary_size` must be more than {len(special)}, to have room for words; received {vocabulary_size}."
        )
    counts, texts = collections.Counter(), list(texts)
    for begin in range(0, len(texts), 1024):
        split = WordTokenizer.split(tf.constant(texts[begin : begin + 1024], "string"), punctuation)
        counts.update(split.flat_values.numpy().tolist())
    if not counts:
        raise ValueError("`texts` must hold at least one word; received none.")
    # Alphabetical order among equals makes the ids independent of the order of the texts.
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary_size - len(special)]
    return WordTokenizer([*special, *(word.decode() for word in words)], punctuation=punctuation)


@keras.saving.register_keras_serializable(package="keras_transformer")
class WordTokenizer(SubwordTokenizer):
    """Tokenizes texts into words: runs of letters, digits and apostrophes, in lower case and Unicode normal form KC.

    Args:
        vocabulary: List of strings, the words, beginning with the four of `WordTokenizer.SPECIAL`: padding, start, end
            and unknown.
        punctuation: Boolean. Whether each mark such as `!` is a word as well; otherwise they are left out.
        **kwargs: The arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Strings of shape `[batch]`, or one string.

    Returns:
        int32 ids, ragged `[batch, length]`, or `[length]` for one string.

    Example:

    >>> tokenizer = WordTokenizer([*WordTokenizer.SPECIAL, "a", "cat", "!"], punctuation=True)
    >>> tokenizer.tokenize(["A cat!", "A rat"]).to_list()
    [[4, 5, 6], [4, 3]]
    """

    def __init__(self, vocabulary=None, punctuation=False, **kwargs):
        super().__init__(vocabulary, **kwargs)
        self.punctuation = punctuation

    @staticmethod
    def split(texts, punctuation):
        """The words of a tensor of strings, ragged."""
        texts = tf.strings.lower(tensorflow_text.normalize_utf8(texts, "NFKC"), encoding="utf-8")
        texts = tf.strings.regex_replace(texts, r"<br\s*/?>", " ")  # The new line of texts that were taken from pages.
        if punctuation:
            texts = tf.strings.regex_replace(texts, r"([^\pL\pM\pN'\s])", r" \1 ")
        else:
            texts = tf.strings.regex_replace(texts, r"[^\pL\pM\pN']+", " ")
        return tf.strings.split(texts)

    def tokenize(self, inputs):
        self._check_vocabulary()
        with tf.device("cpu"):
            words = self.split(tf.convert_to_tensor(inputs, "string"), self.punctuation)
            if isinstance(words, tf.RaggedTensor):
                return words.with_flat_values(self._table.lookup(words.flat_values))
            return self._table.lookup(words)

    def get_config(self):
        return {**super().get_config(), "punctuation": self.punctuation}
