"""Tokenizers trained on the corpus at hand: keras-nlp layers that work inside a TensorFlow graph.

All of them give the ids 0 to 3 to padding, start, end and unknown, and leave the first three out of the text that
`detokenize` returns.
"""

import collections
import io
import os
import re

import keras
import keras_nlp
import tensorflow as tf
import tensorflow_text

PAD_ID, START_ID, END_ID, UNKNOWN_ID = range(4)


def train_sentence_piece(texts, vocabulary_size):
    """Trains a SentencePiece unigram tokenizer on sentences.

    The tokenizer is reversible: detokenizing gives the sentence back, in Unicode normal form KC and with single
    spaces. Every character of the corpus gets a piece.

    Reference: [Kudo and Richardson, 2018](https://arxiv.org/abs/1808.06226).

    Args:
        texts: Iterable of strings. The sentences, of one language or of several that share the vocabulary.
        vocabulary_size: Integer. The largest number of pieces, the four special ones included. A small corpus, from
            which fewer can be learnt, gives a smaller vocabulary; `tokenizer.vocabulary_size()` tells.

    Returns:
        A `SentencePieceTokenizer`.

    Raises:
        ValueError: If there is no text, or `vocabulary_size` cannot hold every character of the corpus.

    Example:

    >>> tokenizer = train_sentence_piece(["a cat sat", "a rat sat on a cat"], vocabulary_size=20)
    >>> tokenizer.detokenize(tokenizer(["a cat"]))
    ['a cat']
    """
    import sentencepiece

    texts = _nonempty(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=2**20,
            pad_id=PAD_ID,
            bos_id=START_ID,
            eos_id=END_ID,
            unk_id=UNKNOWN_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        characters = len(set("".join(texts)))
        raise ValueError(
            f"`vocabulary_size` must leave room for each of the about {characters} characters of the corpus and the "
            f"4 special pieces; received {vocabulary_size} for {len(texts)} sentences. SentencePiece says: {error}"
        ) from error
    return SentencePieceTokenizer(proto=model.getvalue())


def train_word_piece(texts, vocabulary_size, lowercase=False):
    """Trains a WordPiece tokenizer on sentences.

    Words are split at spaces and punctuation before they are cut into pieces; detokenizing joins words and
    punctuation by single spaces.

    Reference: [Schuster and Nakajima, 2012](https://research.google/pubs/pub37842/).

    Args:
        texts: Iterable of strings. The sentences, of one language or of several that share the vocabulary.
        vocabulary_size: Integer. The largest number of pieces, the four special ones included. A small corpus, from
            which fewer can be learnt, gives a smaller vocabulary; `tokenizer.vocabulary_size()` tells.
        lowercase: Boolean. Whether to fold the case of all text.

    Returns:
        A `WordPieceTokenizer`.

    Raises:
        ValueError: If there is no text, or `vocabulary_size` cannot hold every character of the corpus.

    Example:

    >>> tokenizer = train_word_piece(["a cat sat", "a rat sat on a cat"], vocabulary_size=20)
    >>> tokenizer.detokenize(tokenizer(["a cat"]))
    ['a cat']
    """
    texts = _nonempty(texts)
    special = ["[PAD]", "[START]", "[END]", "[UNK]"]
    # The learner keeps every character twice, at the beginning of a word and within, but not more than 1,000.
    characters = len(set("".join(texts).casefold() if lowercase else "".join(texts)) - set(" \n\t"))
    smallest = len(special) + 2 * min(characters, 1000)
    if vocabulary_size < smallest:
        raise ValueError(
            f"`vocabulary_size` must be at least {smallest}, to hold each of the {characters} characters of the "
            f"corpus at the beginning of a word and within; received {vocabulary_size}."
        )
    vocabulary = keras_nlp.tokenizers.compute_word_piece_vocabulary(
        tf.data.Dataset.from_tensor_slices(texts).batch(1024).map(WordPieceTokenizer.normalize),
        vocabulary_size,
        lowercase=lowercase,
        reserved_tokens=special,
    )
    return WordPieceTokenizer(vocabulary=vocabulary, lowercase=lowercase)


def train_subwords(texts, vocabulary_size=None):
    """Collects the vocabulary of text that has been split into subwords already, the most frequent ones first.

    Args:
        texts: Iterable of strings. The sentences, of one language or of several that share the vocabulary.
        vocabulary_size: Optional integer. The largest number of subwords, the four special ones included. By
            default every subword of the corpus gets an id.

    Returns:
        A `SubwordTokenizer`.

    Raises:
        ValueError: If there is no text.

    Example:

    >>> tokenizer = train_subwords(["ein spiel@@ haus", "ein haus"])
    >>> tokenizer.get_vocabulary()
    ['<pad>', '<start>', '<end>', '<unknown>', 'ein', 'haus', 'spiel@@']
    """
    counts = collections.Counter(
        subword for text in _nonempty(texts) for subword in SubwordTokenizer.SPACES.split(text)
    )
    special = SubwordTokenizer.SPECIAL
    for token in ("", *special):
        counts.pop(token, None)
    size = None if vocabulary_size is None else vocabulary_size - len(special)
    # Alphabetical order among equals makes the ids independent of the order of the corpus.
    subwords = sorted(counts, key=lambda subword: (-counts[subword], subword))[:size]
    return SubwordTokenizer([*special, *subwords])


def _nonempty(texts):
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("`texts` must hold at least one sentence to train on; received none.")
    return texts


def _as_ids(ids):
    if isinstance(ids, (tf.Tensor, tf.RaggedTensor)):
        return ids
    if hasattr(ids, "shape"):
        return tf.constant(keras.ops.convert_to_numpy(ids))
    return tf.ragged.constant(ids, dtype="int32")


def _without_special_ids(ids):
    """Drops padding, start and end from ids of shape [length] or [batch, length], dense or ragged."""
    return tf.ragged.boolean_mask(ids, (ids != PAD_ID) & (ids != START_ID) & (ids != END_ID))


@keras.saving.register_keras_serializable(package="keras_transformer")
class SentencePieceTokenizer(keras_nlp.tokenizers.SentencePieceTokenizer):
    """keras-nlp's SentencePiece tokenizer, whose graphs carry the model themselves.

    keras-nlp's own graphs refer to a resource that TensorFlow deletes whenever its kernel cache is cleared, which
    `keras.utils.set_random_seed` does; after that they fail.

    Args:
        proto: Bytes, the trained SentencePiece model.
        **kwargs: The other arguments of `keras_nlp.tokenizers.SentencePieceTokenizer`.

    Example:

    >>> trained = train_sentence_piece(["a cat sat", "a rat sat on a cat"], vocabulary_size=20)
    >>> tokenizer = SentencePieceTokenizer(trained.proto)
    >>> tokenizer.detokenize([[1, *tokenizer("a cat"), 2, 0]])
    ['a cat']
    """

    def tokenize(self, inputs):
        if tf.executing_eagerly():
            return super().tokenize(inputs)
        with tf.device("cpu"):
            return self._graph_tokenizer().tokenize(inputs)

    def detokenize(self, inputs):
        if tf.executing_eagerly():
            return super().detokenize(inputs)
        with tf.device("cpu"):
            return self._graph_tokenizer().detokenize(tf.cast(inputs, "int32"))

    def _graph_tokenizer(self):
        self._check_vocabulary()
        return tensorflow_text.SentencepieceTokenizer(
            self.proto, out_type=self.compute_dtype, add_bos=self.add_bos, add_eos=self.add_eos
        )


@keras.saving.register_keras_serializable(package="keras_transformer")
class WordPieceTokenizer(keras_nlp.tokenizers.WordPieceTokenizer):
    """keras-nlp's WordPiece tokenizer for text that any keyboard wrote.

    Before it splits words, it brings text to Unicode normal form KC and every kind of space to the plain one: a
    no-break space would otherwise belong to its word and make it unknown. `detokenize` leaves out padding, start and
    end.

    Args:
        vocabulary: List of strings, the pieces, beginning with padding, start, end and `"[UNK]"`.
        **kwargs: The other arguments of `keras_nlp.tokenizers.WordPieceTokenizer`.

    Example:

    >>> tokenizer = WordPieceTokenizer(["[PAD]", "[START]", "[END]", "[UNK]", "haus", "##boot"])
    >>> tokenizer.detokenize([[1, 4, 5, 2, 0]])
    ['hausboot']
    """

    def tokenize(self, inputs):
        return super().tokenize(self.normalize(tf.convert_to_tensor(inputs)))

    @staticmethod
    def normalize(text):
        return tf.strings.regex_replace(tensorflow_text.normalize_utf8(text, "NFKC"), r"\p{Z}+", " ")

    def detokenize(self, inputs):
        return super().detokenize(_without_special_ids(_as_ids(inputs)))


@keras.saving.register_keras_serializable(package="keras_transformer")
class SubwordTokenizer(keras_nlp.tokenizers.Tokenizer):
    """A tokenizer for text that subword-nmt or fastBPE has split already: spaces part subwords, `@@` joins them.

    `"ein spiel@@ haus"` is three subwords of two words. Tokenizing looks up the subwords; detokenizing joins them
    and drops every joiner, which gives the words back.

    Reference: [Sennrich et al., 2016](https://arxiv.org/abs/1508.07909).

    Args:
        vocabulary: List of strings, the subwords, beginning with the four of `SubwordTokenizer.SPECIAL`: padding,
            start, end and unknown.
        **kwargs: The arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Strings of shape `[batch]`, or one string.

    Returns:
        int32 ids, ragged `[batch, length]`, or `[length]` for one string.

    Raises:
        ValueError: If `vocabulary` repeats a subword or does not begin with the special ones.

    Example:

    >>> tokenizer = SubwordTokenizer([*SubwordTokenizer.SPECIAL, "ein", "spiel@@", "haus"])
    >>> ids = tokenizer.tokenize(["ein spiel@@ haus", "ein boot"])
    >>> ids.to_list()
    [[4, 5, 6], [4, 3]]
    >>> tokenizer.detokenize(ids).numpy()[0]
    b'ein spielhaus'
    """

    SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
    # The characters at which `tf.strings.split` splits; `str.split` knows more kinds of space.
    SPACES = re.compile(r"[ \t\n\v\f\r]+")
    VOCABULARY_FILE = "vocabulary.txt"

    def __init__(self, vocabulary=None, dtype="int32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.file_assets = [self.VOCABULARY_FILE]
        self.set_vocabulary(vocabulary)

    def set_vocabulary(self, vocabulary):
        """Sets the list of subwords; `None` empties it, to be filled by `load_assets`."""
        self._vocabulary = None if vocabulary is None else list(vocabulary)
        if vocabulary is None:
            return
        if tuple(self._vocabulary[: len(self.SPECIAL)]) != self.SPECIAL:
            raise ValueError(f"`vocabulary` must begin with {self.SPECIAL}; received {self._vocabulary[:4]}.")
        self._ids = {subword: index for index, subword in enumerate(self._vocabulary)}
        if len(self._ids) != len(self._vocabulary):
            repeated = [subword for subword, n in collections.Counter(self._vocabulary).items() if n > 1]
            raise ValueError(f"`vocabulary` must not repeat a subword; received {repeated[:10]} more than once.")
        # Special names in the text are ordinary unknown subwords: text must not be able to end itself.
        with tf.init_scope(), tf.device("cpu"):
            self._table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(
                    tf.constant(self._vocabulary[len(self.SPECIAL) :], "string"),
                    tf.range(len(self.SPECIAL), len(self._vocabulary), dtype="int32"),
                ),
                default_value=UNKNOWN_ID,
            )

    def get_vocabulary(self):
        """Returns the list of subwords."""
        self._check_vocabulary()
        return list(self._vocabulary)

    def vocabulary_size(self):
        """Returns the number of subwords, the special ones included."""
        self._check_vocabulary()
        return len(self._vocabulary)

    def id_to_token(self, id):
        """Returns the subword of an id."""
        if not 0 <= id < self.vocabulary_size():
            raise ValueError(f"`id` must lie between 0 and {self.vocabulary_size() - 1}; received {id}.")
        return self._vocabulary[id]

    def token_to_id(self, token):
        """Returns the id of a subword, that of unknown if it has none."""
        self._check_vocabulary()
        return self._ids.get(token, UNKNOWN_ID)

    def tokenize(self, inputs):
        self._check_vocabulary()
        with tf.device("cpu"):
            subwords = tf.strings.split(tf.convert_to_tensor(inputs, "string"))
            if isinstance(subwords, tf.RaggedTensor):
                return subwords.with_flat_values(self._table.lookup(subwords.flat_values))
            return self._table.lookup(subwords)

    def detokenize(self, inputs):
        self._check_vocabulary()
        with tf.device("cpu"):
            subwords = tf.gather(tf.constant(self._vocabulary), _without_special_ids(_as_ids(inputs)))
            text = tf.strings.reduce_join(subwords, axis=-1, separator=" ")
            return tf.strings.regex_replace(text, "@@( |$)", "")

    def save_assets(self, directory):
        """Writes the vocabulary into a directory, one subword a line."""
        self._check_vocabulary()
        with open(os.path.join(directory, self.VOCABULARY_FILE), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{subword}\n" for subword in self._vocabulary)

    def load_assets(self, directory):
        """Reads what `save_assets` has written."""
        with open(os.path.join(directory, self.VOCABULARY_FILE), encoding="utf-8", newline="\n") as file:
            self.set_vocabulary(file.read().split("\n")[:-1])

    def _check_vocabulary(self):
        if self._vocabulary is None:
            raise ValueError(
                "This `SubwordTokenizer` has no vocabulary yet. Pass `vocabulary`, or call `load_assets` on the "
                "directory that `save_assets` wrote."
            )

    def get_config(self):
        # The vocabulary is an asset: a configuration should stay readable.
        return {**super().get_config(), "vocabulary": None}


def token_ids(tokenizer, texts, batch_size=4096):
    """Tokenizes sentences, as the graph of an exported pipeline does it.

    Args:
        tokenizer: A keras-nlp tokenizer.
        texts: List of strings.
        batch_size: Integer. How many sentences to tokenize at once.

    Returns:
        A list of lists of integers, without start and end.

    Example:

    >>> token_ids(train_subwords(["ein spiel@@ haus"]), ["haus ein", ""])
    [[5, 4], []]
    """
    tokenize = tf.function(tokenizer.tokenize, input_signature=[tf.TensorSpec([None], "string")])
    batches = (texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
    return [row for batch in batches for row in tokenize(tf.constant(batch, "string")).to_list()]
