"""Marian's tokenizer: two SentencePiece models, whose pieces have their ids in a third file."""

import dataclasses
import re

from keras_transformer.pretrained.checkpoint import read_json


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The ids of a text, as `tokenizers.Encoding` has them."""

    ids: list

    @property
    def type_ids(self):
        return [0] * len(self.ids)


class PieceTokenizer:
    """Splits text with one SentencePiece model, joins it as another does, and looks pieces up in a vocabulary.

    The source ends with `</s>`. A text may begin with the code of the language to translate to, such as `>>fra<<`.

    Args:
        source: bytes, the SentencePiece model of the source.
        vocabulary: dict from pieces to ids, with `<unk>`, `</s>` and `<pad>`.
        special: strings, tokens that are found in a text as they are, and left out of what is decoded.

    Raises:
        ValueError: if `source` is no SentencePiece model, or `vocabulary` lacks a token.

    Example:

    >>> import io, sentencepiece
    >>> model = io.BytesIO()
    >>> sentencepiece.SentencePieceTrainer.train(
    ...     sentence_iterator=iter(["a cat sat", "a rat sat"]), model_writer=model, vocab_size=11, minloglevel=2)
    >>> vocabulary = {"</s>": 0, "<unk>": 1, "▁a": 2, "▁": 3, "c": 4, "r": 5, "a": 6, "t": 7, "<pad>": 8}
    >>> tokenizer = PieceTokenizer(model.getvalue(), vocabulary)
    >>> tokenizer.encode_batch(["a rat"])[0].ids[-1]
    0
    """

    def __init__(self, source, vocabulary, special=("</s>", "<unk>", "<pad>")):
        import sentencepiece

        missing = {"</s>", "<unk>", "<pad>"} - set(vocabulary)
        if missing:
            raise ValueError(f"`vocabulary` must have the tokens </s>, <unk> and <pad>; it lacks {sorted(missing)}.")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=source)
        except RuntimeError as error:
            raise ValueError(f"`source` must be a SentencePiece model; the library says: {error}") from error
        self.source = source
        self.vocabulary = vocabulary
        self.special = tuple(sorted(special, key=len, reverse=True))
        self._tokens = {index: piece for piece, index in vocabulary.items()}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    @classmethod
    def from_directory(cls, directory, special, source_name, target_name, vocabulary_name):
        """The tokenizer of a checkpoint directory, with its `SpecialTokens`."""
        if special.settings.get("separate_vocabs"):
            raise ValueError(f"`separate_vocabs` of the tokenizer in {directory} must be false here; received true.")
        vocabulary = read_json(directory, vocabulary_name)
        for index, token in special.added.items():
            found = vocabulary.setdefault(token.content, index)
            if found != index:
                raise ValueError(
                    f"{token.content!r} must have one id in {directory}; it has {found} in {vocabulary_name} and "
                    f"{index} elsewhere."
                )
        named = [token.content for token in [*special.named.values(), *special.others]]
        return cls((directory / source_name).read_bytes(), vocabulary, {"</s>", "<unk>", "<pad>", *named})

    def token_to_id(self, token):
        return self.vocabulary.get(token)

    def encode_batch(self, texts):
        """The ids of each of a list of texts, with the end: list of `Encoding`."""
        return [Encoding([*map(self._id, self._split(text)), self.vocabulary["</s>"]]) for text in texts]

    def decode_batch(self, rows):
        """The text of each of a list of rows of ids."""
        return [self._join(self._tokens.get(index, "<unk>") for index in row) for row in rows]

    def _split(self, text):
        """The pieces of a text, in which special tokens and a language code stay whole."""
        pieces = []
        for part in filter(None, self._special_pattern.split(text)):
            if part in self.special:
                pieces.append(part)
                continue
            code = re.match(">>.*?<<", part, re.DOTALL)
            if code:
                pieces.append(code[0])
                part = part[code.end() :]
            pieces.extend(self._pieces.encode(part, out_type=str))
        return pieces

    def _id(self, piece):
        return self.vocabulary.get(piece, self.vocabulary["<unk>"])

    def _join(self, pieces):
        text = "".join(piece for piece in pieces if piece not in self.special)
        return text.replace("▁", " ").strip()
