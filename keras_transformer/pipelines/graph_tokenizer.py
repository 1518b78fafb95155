"""The tokenizer of a checkpoint inside of a TensorFlow graph, for a SavedModel: texts to ids."""

import json
import re

import tensorflow as tf
import tensorflow_text

from keras_transformer.pipelines.graph_pieces import BytePairs, SentencePieces, WordPieces, table
from keras_transformer.pipelines.graph_text import WHITE, clean, places, refuse, split_out
from keras_transformer.pipelines.piece_tokenizer import PieceTokenizer
from keras_transformer.pipelines.readers import frame

# What tells tokenizers apart: kinds of space, accents, capitals, scripts, digits, signs, and what has no piece.
SAMPLES = (
    "", "A man reads a book.", "  two  spaces ", "tab\t and\n\n lines\r\n  end \n", "\u00a0no-break\u2003and\u3000wide",
    "Café naïve e\u0301 Ünïcödé", "THE MAN'S DON'T we're", "3,141.59 x2 ٣ ½ Ⅳ", "日本語のテキスト 中文", "ﬁ ① Ａ ™",
    "ΟΔΟΣ İstanbul ẞ", "🙂 👨\u200d👩\u200d👧", "<tag> [x] {y} a_b `c` -- … “q”", "zq\x07\u200b\ufffd", "x" * 120,
    "▁ ▁a a▁b",
)  # fmt: skip


class GraphTokenizer(tf.Module):
    """A tokenizer that works inside of a `tf.function`.

    Args:
        pieces: function from texts `[N]`, and whether they begin their text, to ids, ragged `[N, length]`.
        special: dict from tokens that are found in a text as they are, to their ids.
        begin: ints, the ids that are put before a text.
        end: ints, the ids that are put behind it.
        strips: dict from special tokens to which spaces beside them belong to them, such as `["left"]`.

    Example:

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "dog", "##s", "run"])}
    >>> tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    >>> GraphTokenizer.of(tokenizer)(["dogs run"]).to_list()
    [[1, 2, 3]]
    """

    def __init__(self, pieces, special, begin, end, strips=None):
        super().__init__()
        self._pieces = pieces
        self._begin, self._end = list(begin), list(end)
        self._ids = table(list(special), list(special.values())) if special else None
        self._special = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._strips = strips or {}

    @classmethod
    def of(cls, tokenizer):
        """The same as another tokenizer.

        Args:
            tokenizer: `tokenizers.Tokenizer` or `PieceTokenizer`.

        Raises:
            ValueError: if a part of it has no counterpart here, with the name of the part; or if there is a text among
                `SAMPLES`, or with a special token in it, that this cuts into other tokens.
        """
        graph = (_of_two_models if isinstance(tokenizer, PieceTokenizer) else _of_one_model)(tokenizer)
        texts = [*SAMPLES, *(f"a {token} b{token}c" for token in [*_special_tokens(tokenizer)][:12])]
        wanted = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        found = tf.function(graph, autograph=False)(tf.constant(texts)).to_list()
        for text, own, ids in zip(texts, found, wanted, strict=True):
            if own != ids:
                raise ValueError(
                    f"The tokenizer cannot be exported: in a TensorFlow graph, the text {text!r} would have the tokens "
                    f"{own} in place of {ids}."
                )
        return graph

    def __call__(self, texts, adds_special=True):
        """Texts `[B]` to ids, ragged int32 `[B, length]`."""
        texts = clean(texts)
        for token, sides in self._strips.items():
            if sides:
                before, behind = (f"[{WHITE}]*" if side in sides else "" for side in ("left", "right"))
                texts = tf.strings.regex_replace(texts, f"{before}({re.escape(token)}){behind}", r"\1")
        if self._special:
            parts = split_out(texts, self._special)  # ragged [B, parts]
        else:
            parts = tf.RaggedTensor.from_row_lengths(texts, tf.ones_like(texts, "int64"))
        number, flat = places(parts), parts.flat_values
        is_special = number % 2 == 1
        ids = tf.cast(self._pieces(tf.where(is_special, "", flat), number == 0), "int64")  # ragged [parts, length]
        if self._special:
            special_ids = self._ids.lookup(tf.boolean_mask(flat, is_special))
            ids = tf.concat([tf.RaggedTensor.from_row_lengths(special_ids, tf.cast(is_special, "int64")), ids], axis=1)
        rows = parts.with_flat_values(ids).merge_dims(1, 2)
        if adds_special:
            batch = tf.shape(texts)[0]
            begin, end = (tf.tile(tf.constant([x], "int64"), [batch, 1]) for x in (self._begin, self._end))
            rows = tf.concat([tf.RaggedTensor.from_tensor(begin), rows, tf.RaggedTensor.from_tensor(end)], axis=1)
        return tf.cast(rows, "int32")


def _of_one_model(tokenizer):
    spec = json.loads(tokenizer.to_str())
    added = spec["added_tokens"]
    kind = (spec["model"]["type"], bool(spec["model"].get("byte_fallback")))
    models = {("BPE", False): BytePairs, ("BPE", True): SentencePieces, ("WordPiece", False): WordPieces}
    models |= {("Unigram", has_bytes): SentencePieces for has_bytes in (False, True)}
    if kind not in models:
        refuse("model", spec["model"]["type"])
    for token in added:
        if token["single_word"]:
            refuse("added token", f"{token['content']} (single_word)")
    special = {token["content"]: token["id"] for token in added}
    strips = {token["content"]: [side for side in ("left", "right") if token[f"{side[0]}strip"]] for token in added}
    return GraphTokenizer(models[kind](spec), special, *frame(tokenizer), strips)


class _PiecesByName(tf.Module):
    """The ids that a vocabulary has for the pieces of a SentencePiece model, and for the code of a language."""

    def __init__(self, tokenizer):
        super().__init__()
        self._proto = tokenizer.source
        vocabulary = tokenizer.vocabulary
        self._ids = table(list(vocabulary), list(vocabulary.values()), vocabulary["<unk>"])

    def __call__(self, texts, is_first):
        codes = tf.strings.regex_replace(texts, r"(?s)^(>>.*?<<)?.*$", r"\1")
        has_code = codes != ""
        codes = tf.RaggedTensor.from_row_lengths(tf.boolean_mask(codes, has_code), tf.cast(has_code, "int64"))
        model = tensorflow_text.SentencepieceTokenizer(self._proto, out_type="string")
        pieces = model.tokenize(tf.strings.regex_replace(texts, r"(?s)^>>.*?<<", ""))
        pieces = tf.concat([codes, pieces], axis=1)
        return pieces.with_flat_values(self._ids.lookup(pieces.flat_values))


def _of_two_models(tokenizer):
    special = {token: tokenizer.vocabulary[token] for token in tokenizer.special if token in tokenizer.vocabulary}
    return GraphTokenizer(_PiecesByName(tokenizer), special, [], [tokenizer.vocabulary["</s>"]])


def _special_tokens(tokenizer):
    if isinstance(tokenizer, PieceTokenizer):
        return [*tokenizer.special, ">>xyz<<"]
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]
