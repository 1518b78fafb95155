"""The tokenizer of a checkpoint, from `tokenizer.json` or from the files that came before it.

Nothing of a checkpoint is executed: files are read as JSON, as text, or as the protocol buffer of SentencePiece.
"""

import dataclasses
from pathlib import Path

from keras_transformer.pipelines.piece_tokenizer import PieceTokenizer
from keras_transformer.pipelines.tokenizer_conventions import byte_pairs, sentence_pieces, word_pieces
from keras_transformer.pretrained.checkpoint import read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What the library itself calls a tokenizer that says nothing of its kind.
NAMELESS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# Spaces that word pieces leave before punctuation and in contractions.
SPACES_TO_CLEAN = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


def read_tokenizer(directory):
    """Reads the tokenizer of a checkpoint directory.

    These files will do, the first of them that are there: `tokenizer.json`; `source.spm`, `target.spm` and
    `vocab.json` (Marian); `vocab.json` and `merges.txt` (GPT-2, RoBERTa, BART, Whisper, CLIP, Qwen2); `vocab.txt`
    (BERT, DistilBERT); `spiece.model` or `tokenizer.model` (T5, LLaMA, Gemma). Beside them, `tokenizer_config.json`,
    `special_tokens_map.json` and `added_tokens.json` say which tokens are special and how text is prepared.

    Args:
        directory: path of the checkpoint directory.

    Returns:
        `tokenizers.Tokenizer`, which neither cuts nor pads, or for Marian a `PieceTokenizer` with the same methods
        `encode_batch`, `decode_batch` and `token_to_id`.

    Raises:
        FileNotFoundError: if none of these files is there; all of them are listed.
        ValueError: if a file is damaged, or says of a kind of tokenizer that is not known here.

    Example:

    >>> read_tokenizer("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: `directory` must hold a tokenizer: tokenizer.json, or source.spm with target.spm and ...
    """
    directory = Path(directory)
    readers = {
        ("tokenizer.json",): _read_whole,
        ("source.spm", "target.spm", "vocab.json"): PieceTokenizer.from_directory,
        ("vocab.json", "merges.txt"): _read_byte_pairs,
        ("vocab.txt",): _read_word_pieces,
        ("spiece.model",): _read_sentence_pieces,
        ("tokenizer.model",): _read_sentence_pieces,
    }
    for names, read in readers.items():
        if all((directory / name).is_file() for name in names):
            return read(directory, SpecialTokens.from_directory(directory), *names)
    listed = ", or ".join(" with ".join([names[0], " and ".join(names[1:])][: len(names)]) for names in readers)
    raise FileNotFoundError(f"`directory` must hold a tokenizer: {listed}; there is none in {directory}.")


@dataclasses.dataclass
class SpecialTokens:
    """What a checkpoint says of its tokens, besides the vocabulary.

    Args:
        settings: dict. What `tokenizer_config.json` and `special_tokens_map.json` hold.
        named: dict from names such as `"eos_token"` to `tokenizers.AddedToken`.
        others: list of `AddedToken`, special tokens without a name.
        added: dict from ids to `AddedToken`, tokens with the ids that they must have.
    """

    settings: dict
    named: dict
    others: list
    added: dict

    @classmethod
    def from_directory(cls, directory):
        settings = _read_if_there(directory, "tokenizer_config.json")
        added = {int(index): _token(token) for index, token in settings.get("added_tokens_decoder", {}).items()}
        if not added:  # Older files say the same in two others.
            settings = {**settings, **_read_if_there(directory, "special_tokens_map.json")}
        named = {name: _token(settings[name]) for name in SPECIAL_NAMES if settings.get(name) is not None}
        others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        others = [_token(token) for token in (others.values() if isinstance(others, dict) else others)]
        if not added:
            special = {token.content for token in [*named.values(), *others]}
            for content, index in _read_if_there(directory, "added_tokens.json").items():
                added[index] = _token(content, is_special=content in special)
        by_content = {token.content: token for token in added.values()}
        named = {name: by_content.get(token.content, token) for name, token in named.items()}
        return cls(settings, named, others, dict(sorted(added.items())))

    @property
    def kind(self):
        """The class of tokenizer that the files name, without what tells fast ones from slow ones, or None."""
        kind = (self.settings.get("tokenizer_class") or "").removesuffix("Fast")
        return None if kind in ("", *NAMELESS) else kind

    def with_defaults(self, defaults):
        """The same where tokens that are not named have the names of `defaults`, a dict from name to string."""
        return dataclasses.replace(self, named={**{n: _token(x) for n, x in defaults.items()}, **self.named})

    def register(self, tokenizer):
        """Makes special tokens special, and adds those that the vocabulary does not have at their ids."""
        for index, token in self.added.items():
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            found = tokenizer.token_to_id(token.content)
            if found != index:
                raise ValueError(
                    f"The added token {token.content!r} must have the id {index}, and would have {found}: the files "
                    "of the tokenizer do not fit each other."
                )
        said = self.settings.keys()
        for name, token in self.named.items():
            if name in said or tokenizer.token_to_id(token.content) is not None:
                tokenizer.add_special_tokens([token])
        tokenizer.add_special_tokens(self.others)


def _token(token, is_special=True):
    """`AddedToken` from what the files have: a string, or a dict of its arguments."""
    from tokenizers import AddedToken

    if isinstance(token, dict):
        options = {name: value for name, value in token.items() if name not in ("__type", "content")}
        return AddedToken(token["content"], **{"special": True, **options})
    return AddedToken(token, special=is_special, normalized=not is_special)


def _read_if_there(directory, name):
    return read_json(directory, name) if (directory / name).is_file() else {}


def _read_whole(directory, special, name):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / name))
    except Exception as error:  # The library raises `Exception` itself.
        raise ValueError(f"{directory / name} must be what `tokenizers` writes; it says: {error}") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens([x for x in [*special.named.values(), *special.others] if x.content not in known])
    return _finished(tokenizer, special)


def _read_byte_pairs(directory, special, vocabulary_name, merges_name):
    vocabulary = read_json(directory, vocabulary_name)
    merges = []
    for number, line in enumerate(_read_lines(directory / merges_name), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        merges.append(tuple(line.split()))
        if len(merges[-1]) != 2:
            raise ValueError(
                f"{directory / merges_name}, line {number}: a line must have two parts; received {line!r}."
            )
    return _finished(byte_pairs(vocabulary, merges, special), special)


def _read_word_pieces(directory, special, name):
    pieces = _read_lines(directory / name)
    return _finished(word_pieces({piece: index for index, piece in enumerate(pieces)}, special), special)


def _read_sentence_pieces(directory, special, name):
    return _finished(sentence_pieces(directory / name, special), special)


def _read_lines(path):
    # Only a newline ends a line: pieces may hold any other Unicode separator.
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8; {error}.") from error
    return lines if lines[-1] else lines[:-1]


def _finished(tokenizer, special):
    """Cleans spaces up where that is asked for, and neither cuts nor pads."""
    from tokenizers import decoders, models

    # Of byte pairs, spaces are a part.
    if special.settings.get("clean_up_tokenization_spaces") and not isinstance(tokenizer.model, models.BPE):
        spaces = [decoders.Replace(spaced, spaced.strip()) for spaced in SPACES_TO_CLEAN]
        spaces.insert(4, decoders.Replace(" ' ", "'"))
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *spaces])
    tokenizer.no_padding()
    tokenizer.no_truncation()  # A text that is too long is an error of the model, not cut.
    return tokenizer
