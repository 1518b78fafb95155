"""How tokenizers cut words into pieces, as TensorFlow operations: byte pairs, SentencePiece models, and word pieces.

Each is called with texts `[N]` and whether they begin their text `[N]`, and returns ids, ragged `[N, length]`; of an
empty text, none.
"""

import base64
import re

import tensorflow as tf
import tensorflow_text

from keras_transformer.pipelines.graph_text import MARK, WHITE, normalizer, refuse, splitter

NONE = tf.int64.max
BYTE = re.compile("<0x([0-9A-F]{2})>")


def byte_alphabet():
    """The letter that stands for each of the 256 bytes in vocabularies of byte pairs."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def table(keys, values, default=-1):
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(keys), tf.constant(values, "int64"))
    return tf.lookup.StaticHashTable(initializer, default)


class BytePairs(tf.Module):
    """Merges the bytes of words, the earliest merges first, as GPT-2 does.

    Reference: [Sennrich et al., 2016](https://arxiv.org/abs/1508.07909), and
    [Language Models are Unsupervised Multitask Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf),
    section 2.2.

    Args:
        spec: dict, what tokenizer.json holds.
    """

    def __init__(self, spec):
        super().__init__()
        model = spec["model"]
        vocabulary, end = model["vocab"], model.get("end_of_word_suffix") or ""
        if model.get("dropout") or model.get("continuing_subword_prefix"):
            refuse("model", "BPE with dropout or a prefix of what continues a word")
        letters = byte_alphabet().values()
        if any(letter not in vocabulary or letter + end not in vocabulary for letter in letters):
            refuse("model", "BPE without a token for each byte")
        self._size = max(vocabulary.values()) + 1
        self._normalize, self._split = normalizer(spec["normalizer"]), splitter(spec["pre_tokenizer"])
        single = [bytes([byte]) for byte in byte_alphabet()]
        self._first_ids = table(single, [vocabulary[letter] for letter in letters])
        self._last_ids = table(single, [vocabulary[letter + end] for letter in letters])
        self._merges = self._merge_table(model["merges"], vocabulary)
        self._words = None
        if model.get("ignore_merges"):  # Words of the vocabulary are taken whole.
            from_letter = {letter: byte for byte, letter in byte_alphabet().items()}
            whole = {
                bytes(from_letter[letter] for letter in token): index
                for token, index in vocabulary.items()
                if all(letter in from_letter for letter in token)
            }
            self._words = table(list(whole), list(whole.values()))

    def _merge_table(self, merges, vocabulary):
        """From a pair of ids, as one number, to the rank of their merge and its id, as one number."""
        keys, values = [-1], [NONE]
        for rank, pair in enumerate(merges):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            keys.append(vocabulary[left] * self._size + vocabulary[right])
            values.append(rank * self._size + vocabulary[left + right])
        return table(tf.constant(keys, "int64"), values, NONE)

    def __call__(self, texts, is_first):
        words = self._split(self._normalize(texts))  # ragged [N, words]
        letters = tf.strings.bytes_split(words.flat_values)
        dense = letters.to_tensor("")
        dense = tf.pad(dense, ((0, 0), (0, 1)))  # [words, length], one of them empty
        is_last = tf.range(tf.shape(dense)[1], dtype="int64") == letters.row_lengths()[:, None] - 1
        ids = tf.where(is_last, self._last_ids.lookup(dense), self._first_ids.lookup(dense))
        if self._words is not None:
            whole = self._words.lookup(words.flat_values)[:, None]
            only = tf.pad(whole, ((0, 0), (0, tf.shape(dense)[1] - 1)), constant_values=-1)
            ids = tf.where(whole >= 0, only, ids)
        ids, _ = tf.while_loop(
            lambda ids, goes_on: goes_on,
            self._merge_once,
            [ids, tf.constant(True)],
            shape_invariants=[tf.TensorShape([None, None]), tf.TensorShape([])],
        )
        ids = tf.RaggedTensor.from_tensor(ids, padding=-1)
        return words.with_flat_values(ids).merge_dims(1, 2)

    def _merge_once(self, ids, goes_on):
        """The best merge of each word, and whether there was one in any."""
        left, right = ids[:, :-1], ids[:, 1:]
        found = self._merges.lookup(tf.where(right >= 0, left * self._size + right, -1))
        best, at = tf.reduce_min(found, axis=1, keepdims=True), tf.argmin(found, axis=1)[:, None]
        place = tf.range(tf.shape(ids, out_type="int64")[1])[None]
        following = tf.pad(right, ((0, 0), (0, 1)), constant_values=-1)
        merged = tf.where(place < at, ids, tf.where(place == at, best % self._size, following))
        return tf.where(best < NONE, merged, ids), tf.reduce_any(best < NONE)


class SentencePieces(tf.Module):
    """Cuts text as a SentencePiece model does, which is made of what tokenizer.json holds.

    Args:
        spec: dict, what tokenizer.json holds.
    """

    def __init__(self, spec):
        super().__init__()
        charsmap, rest, strips = _charsmap(spec["normalizer"])
        self._scheme, collapses = _spaces(spec["pre_tokenizer"])
        self._normalize = normalizer(rest)
        self._collapses = strips or collapses
        proto = sentence_piece_model(spec["model"], {token["content"] for token in spec["added_tokens"]})
        proto.normalizer_spec.precompiled_charsmap = charsmap
        proto.normalizer_spec.remove_extra_whitespaces = self._collapses
        proto.normalizer_spec.add_dummy_prefix = self._collapses
        self._proto = proto.SerializeToString()

    def __call__(self, texts, is_first):
        texts = self._normalize(texts)
        if self._collapses:  # Then the model sees to the spaces around words.
            texts = tf.strings.regex_replace(texts, f"[{WHITE}]", " ")
        elif self._scheme != "never":
            texts = tf.strings.regex_replace(texts, " ", "▁")
            takes_none = tf.strings.regex_full_match(texts, "(?s)▁.*") | (texts == "")
            takes_none |= ~is_first & (self._scheme == "first")
            texts = tf.where(takes_none, texts, tf.strings.join(["▁", texts]))
        # Made within the graph, so that the graph carries the model.
        return tensorflow_text.SentencepieceTokenizer(self._proto, out_type="int32").tokenize(texts)


def sentence_piece_model(model, added):
    """The SentencePiece model of what tokenizer.json says of a `Unigram`, or of a `BPE` with bytes to fall back on.

    Args:
        model: dict.
        added: strings, tokens that are found in a text before the model sees it.

    Returns:
        `ModelProto` of the `sentencepiece` library.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    if model["type"] == "Unigram":
        scores, unknown = dict(model["vocab"]), model["vocab"][model["unk_id"]][0]
        ids = {piece: index for index, piece in enumerate(scores)}
        proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    else:
        ids, unknown = model["vocab"], model.get("unk_token") or "<unk>"
        scores = {}
        for rank, pair in enumerate(model["merges"]):
            scores.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -float(rank))
        scores |= {piece: 0.0 for piece in ids if len(piece) == 1}
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = bool(model.get("byte_fallback"))
    pieces = {index: piece for piece, index in ids.items()}
    for index in range(max(pieces) + 1):
        piece = pieces.get(index, f"<nothing {index}>")
        kind = kinds.NORMAL if piece in scores and piece not in added else kinds.CONTROL
        kind = kinds.BYTE if proto.trainer_spec.byte_fallback and BYTE.fullmatch(piece) else kind
        kind = kinds.UNKNOWN if piece == unknown else kind
        proto.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=kind)
    if unknown not in ids:
        proto.pieces.add(piece=unknown, type=kinds.UNKNOWN)
    proto.trainer_spec.unk_id = ids.get(unknown, len(proto.pieces) - 1)
    proto.normalizer_spec.escape_whitespaces = True
    return proto


def _charsmap(spec):
    """Of a normalizer: the map of characters, what else there is to do, and whether that is to strip spaces."""
    steps = [] if spec is None else spec["normalizers"] if spec["type"] == "Sequence" else [spec]
    if not any(step["type"] == "Precompiled" for step in steps):
        return b"", spec, False
    first, *rest = steps
    strips = [{"type": "Strip", "strip_left": False, "strip_right": True}]
    strips += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": content} for content in ("▁", " ")]
    if first["type"] != "Precompiled" or any(step not in strips for step in rest):
        refuse("normalizer", f"Precompiled among {[step['type'] for step in steps]}")
    return base64.b64decode(first["precompiled_charsmap"]), None, bool(rest)


def _spaces(spec):
    """Of a pre-tokenizer: where it puts a space before a text, and whether it makes several spaces one."""
    steps = [] if spec is None else spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"]:
        return steps[0]["prepend_scheme"], False
    if kinds == ["WhitespaceSplit", "Metaspace"] and steps[1]["prepend_scheme"] == "always":
        return "always", True
    # Gemma's finds nothing to split, as its normalizer leaves no space.
    if not kinds or (kinds == ["Split"] and steps[0]["pattern"] == {"String": " "}):
        return "never", False
    return refuse("pre-tokenizer", " with ".join(kinds))


class WordPieces(tf.Module):
    """Cuts words into the longest pieces that there are, as BERT does.

    Args:
        spec: dict, what tokenizer.json holds.
    """

    def __init__(self, spec):
        super().__init__()
        model = spec["model"]
        self._normalize, self._split = normalizer(spec["normalizer"]), splitter(spec["pre_tokenizer"])
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
            refuse("model", "WordPiece with gaps between its ids")
        self._longest = model["max_input_chars_per_word"]
        self._pieces = tensorflow_text.FastWordpieceTokenizer(
            pieces,
            suffix_indicator=model["continuing_subword_prefix"],
            max_bytes_per_word=4 * self._longest,
            token_out_type=tf.int64,
            unknown_token=model["unk_token"],
            no_pretokenization=True,
        )

    def __call__(self, texts, is_first):
        words = self._split(self._normalize(texts))  # ragged [N, words]
        flat = words.flat_values
        flat = tf.where(tf.strings.length(flat, unit="UTF8_CHAR") > self._longest, MARK, flat)  # No piece has a mark.
        return words.with_flat_values(self._pieces.tokenize(flat)).merge_dims(1, 2)
