"""The tokenizer of a checkpoint inside of a TensorFlow graph, for a SavedModel: ids to texts."""

import json
import re

import numpy as np
import tensorflow as tf

from keras_transformer.pipelines.graph_pieces import BYTE, byte_alphabet
from keras_transformer.pipelines.graph_text import WHITE, clean, pattern_of, refuse
from keras_transformer.pipelines.piece_tokenizer import PieceTokenizer


class GraphDecoder(tf.Module):
    """Writes ids as text: puts the bytes of their tokens together, and mends what comes of it.

    Args:
        tokens: list of bytes, the token of each id.
        dropped: ints, ids that are left out.
        steps: functions of texts `[B]`.
        is_byte: booleans, whether each id stands for a byte, which is a part of a letter; or None.

    Example:

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.WordLevel({"▁dogs": 0, "▁run": 1, "ning": 2}))
    >>> tokenizer.decoder = decoders.Metaspace()
    >>> GraphDecoder.of(tokenizer)([[0, 1, 2]]).numpy()[0]
    b'dogs running'
    """

    def __init__(self, tokens, dropped, steps, is_byte=None):
        super().__init__()
        self._is_byte = None if is_byte is None else tf.constant([*is_byte, False])
        kept = [index not in dropped for index in range(len(tokens))]
        # What has no token is left out as well.
        self._tokens, self._kept = tf.constant([*tokens, b""]), tf.constant([*kept, False])
        self._steps = steps

    def __call__(self, ids):
        ids = tf.minimum(ids, len(self._tokens) - 1)
        kept = tf.ragged.boolean_mask(ids, tf.gather(self._kept, ids))
        tokens = kept.with_flat_values(tf.gather(self._tokens, kept.flat_values))
        tokens = tokens if self._is_byte is None else self._mended(tokens, kept)
        text = clean(tf.strings.reduce_join(tokens, axis=-1))
        for step in self._steps:
            text = step(text)
        return text

    def _mended(self, tokens, ids):
        """Tokens of which bytes in a row that are no text together are each replaced."""
        is_byte, row = tf.gather(self._is_byte, ids.flat_values), ids.value_rowids()
        changes = (is_byte[1:] != is_byte[:-1]) | (row[1:] != row[:-1])
        run = tf.concat([tf.zeros_like(row[:1]), tf.cumsum(tf.cast(changes, row.dtype))], axis=0)
        count = tf.reduce_max(tf.concat([run + 1, [0]], axis=0))
        together = tf.strings.unsorted_segment_join(tokens.flat_values, run, count)
        is_text = tf.gather(clean(together) == together, run)
        return tokens.with_flat_values(tf.where(is_byte & ~is_text, "\ufffd", tokens.flat_values))

    @classmethod
    def of(cls, tokenizer):
        """What writes the same as a tokenizer.

        Args:
            tokenizer: `tokenizers.Tokenizer` or `PieceTokenizer`.

        Raises:
            ValueError: if a part of its decoder has no counterpart here, with the name of the part; or if there are ids
                of which it makes another text.
        """
        decoder = (_of_two_models if isinstance(tokenizer, PieceTokenizer) else _of_one_model)(tokenizer)
        rows = np.random.default_rng(0).integers(0, len(decoder._tokens), (64, 16)).tolist()
        found = tf.function(decoder, autograph=False)(tf.constant(rows, "int32")).numpy()
        for ids, own, text in zip(rows, found, tokenizer.decode_batch(rows), strict=True):
            if own.decode("utf-8") != text:
                raise ValueError(
                    f"The tokenizer cannot be exported: in a TensorFlow graph, the tokens {ids} would be the text "
                    f"{own.decode('utf-8')!r} in place of {text!r}."
                )
        return decoder


def _of_one_model(tokenizer):
    spec = json.loads(tokenizer.to_str())["decoder"]
    kinds = [] if spec is None else spec.get("decoders", [spec])
    of_tokens, of_texts, is_whole = [], [], False
    for step in kinds:
        kind = step["type"]
        if kind in ("Fuse", "ByteLevel"):
            of_tokens += [] if is_whole or kind == "Fuse" else [_from_letters]
            is_whole = True
        elif kind == "Replace" and not is_whole and "String" in step["pattern"]:
            of_tokens.append(_replacing(step["pattern"]["String"], step["content"]))
        elif kind == "Replace" and is_whole:
            of_texts.append(_replacing_in_graph(pattern_of(step["pattern"]), step["content"]))
        elif kind == "ByteFallback" and not is_whole:
            of_tokens.append(_from_byte)
        elif kind == "Strip" and is_whole and not step["stop"]:
            of_texts.append(_replacing_in_graph(f"^{re.escape(step['content'])}{{0,{step['start']}}}", ""))
        elif kind == "Metaspace":
            of_tokens.append(_replacing(step["replacement"], " "))
            of_texts += [_replacing_in_graph("^ ", "")] if step["prepend_scheme"] != "never" else []
            is_whole = True
        else:
            refuse("decoder", kind)
    if not is_whole:
        refuse("decoder", "which parts tokens by spaces")
    tokens = [tokenizer.id_to_token(index) or "" for index in range(max(tokenizer.get_vocab().values()) + 1)]
    is_byte = [BYTE.fullmatch(token) is not None for token in tokens] if _from_byte in of_tokens else None
    for step in of_tokens:
        tokens = [step(token) for token in tokens]
    tokens = [token.encode("utf-8") if isinstance(token, str) else token for token in tokens]
    dropped = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return GraphDecoder(tokens, dropped, of_texts, is_byte)


def _of_two_models(tokenizer):
    by_id = {index: token for token, index in tokenizer.vocabulary.items()}
    tokens = [by_id.get(index, "") for index in range(max(by_id) + 1)]
    dropped = {index for index, token in enumerate(tokens) if token in tokenizer.special}
    tokens = [token.replace("▁", " ").encode("utf-8") for token in tokens]
    return GraphDecoder(tokens, dropped, [_replacing_in_graph(f"^[{WHITE}]+|[{WHITE}]+$", "")])


BYTES = {letter: byte for byte, letter in byte_alphabet().items()}


def _from_letters(token):
    return bytes(BYTES[letter] for letter in token) if all(letter in BYTES for letter in token) else token


def _from_byte(token):
    match = BYTE.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token


def _replacing(old, new):
    return lambda token: token.replace(old, new) if isinstance(token, str) else token


def _replacing_in_graph(pattern, content):
    content = content.replace("\\", r"\\")
    return lambda text: tf.strings.regex_replace(text, pattern, content)
