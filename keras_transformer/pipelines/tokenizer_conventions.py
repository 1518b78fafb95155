"""How tokenizers of published checkpoints split text and put special tokens in, where their files do not say so.

Before there was `tokenizer.json`, that stood in the code of `transformers` alone; `tokenizer_class` names it. Where
that is not given, the vocabulary tells: pieces ending in `</w>` are CLIP's, `<s>` is RoBERTa's, and so on.
"""

import warnings

# The kind -> the names of its special tokens where the files do not name them.
BYTE_PAIRS = {
    "GPT2Tokenizer": {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
    "WhisperTokenizer": {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
    "Qwen2Tokenizer": {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")},
    "RobertaTokenizer": {
        **{"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"},
        **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    },
    "CLIPTokenizer": {
        "bos_token": "<|startoftext|>",
        **{name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")},
    },
}
BYTE_PAIRS["BartTokenizer"] = BYTE_PAIRS["RobertaTokenizer"]
WORD_PIECES = {
    kind: {
        **{"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"},
        "mask_token": "[MASK]",
    }
    for kind in ("BertTokenizer", "DistilBertTokenizer")
}
INFILLING = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")
SENTENCE_PIECES = {
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "CodeLlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        **{"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        "mask_token": "<mask>",
    },
}
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_pairs(vocabulary, merges, special):
    """The tokenizer of `vocab.json` and `merges.txt`.

    Args:
        vocabulary: dict from tokens to ids.
        merges: list of pairs of tokens.
        special: `SpecialTokens`.

    Returns:
        `tokenizers.Tokenizer`.

    Raises:
        ValueError: if `tokenizer_class` names a kind that is not known here, or the two do not fit each other.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind = _known_kind(special, BYTE_PAIRS, "vocab.json with merges.txt", lambda: _kind_of_byte_pairs(vocabulary))
    special = special.with_defaults(BYTE_PAIRS[kind])
    has_words = kind == "CLIPTokenizer"
    unknown = {"unk_token": special.named["unk_token"].content, "end_of_word_suffix": "</w>"} if has_words else {}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, **unknown))
    except Exception as error:  # The library raises `Exception` itself.
        raise ValueError(f"vocab.json and merges.txt must fit each other; `tokenizers` says: {error}") from error
    space_first = bool(special.settings.get("add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    if has_words:
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        ends = [decoders.Replace(Regex(r"</w>\z"), ""), decoders.Replace("</w>", " ")]
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *ends])
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        ends = pre_tokenizers.ByteLevel(add_prefix_space=space_first, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, ends])
    special.register(tokenizer)
    around = {"CLIPTokenizer": ("bos_token", "eos_token")}.get(kind, ("cls_token", "sep_token"))
    if all(name in special.named for name in around):
        first, last = (_with_id(tokenizer, special.named[name].content) for name in around)
        tokenizer.post_processor = processors.RobertaProcessing(last, first, not has_words, space_first)
    else:
        _put_around(tokenizer, special)
    return tokenizer


def word_pieces(vocabulary, special):
    """The tokenizer of `vocab.txt`: arguments and errors as `byte_pairs`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind = _known_kind(special, WORD_PIECES, "vocab.txt", lambda: "BertTokenizer")
    special = special.with_defaults(WORD_PIECES[kind])
    unknown, first, last = (special.named[name].content for name in ("unk_token", "cls_token", "sep_token"))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=special.settings.get("tokenize_chinese_chars", True),
        strip_accents=special.settings.get("strip_accents"),
        lowercase=special.settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special.register(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[_with_id(tokenizer, first), _with_id(tokenizer, last)],
    )
    return tokenizer


def sentence_pieces(path, special):
    """The tokenizer of a SentencePiece model.

    Args:
        path: path of the model.
        special: `SpecialTokens`.

    Returns:
        `tokenizers.Tokenizer`.

    Raises:
        ValueError: if the file is no such model, or of a kind that is not known here.
    """
    proto = read_sentence_piece_model(path)
    kind = _known_kind(special, SENTENCE_PIECES, path.name, lambda: _kind_of_sentence_pieces(proto, path))
    special = special.with_defaults(SENTENCE_PIECES[kind])
    build = _unigrams if kind == "T5Tokenizer" else _merged_pieces
    tokenizer, ends = build(proto, kind, special)
    special.register(tokenizer)
    _put_around(tokenizer, special, **ends)
    return tokenizer


def read_sentence_piece_model(path):
    """Parses the protocol buffer of a SentencePiece model."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} must be a SentencePiece model; {error}.") from error
    if not proto.pieces:
        raise ValueError(f"{path} must be a SentencePiece model; it has no pieces.")
    return proto


def _unigrams(proto, kind, special):
    """T5: the likeliest pieces, and an end."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    # Numbered from the end of the vocabulary backwards.
    extra = [f"<extra_id_{i}>" for i in reversed(range(special.settings.get("extra_ids", 100)))]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((x, 0.0) for x in extra)], proto.trainer_spec.unk_id))
    if proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    spaces = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    _add_user_symbols(tokenizer, proto)
    tokenizer.add_special_tokens(extra)
    return tokenizer, {"add_eos_token": True}


def _merged_pieces(proto, kind, special):
    """LLaMA and Gemma: pieces merged from characters, and bytes where there is no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges_of(vocabulary), fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "GemmaTokenizer":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        space_first = special.settings.get("add_prefix_space") is not False
        # "Legacy" puts a space behind each special token as well, and not at the beginning of the text alone.
        scheme = ("always" if special.settings.get("legacy") else "first") if space_first else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        steps += [decoders.Strip(" ", 1, 0)] if space_first else []
    tokenizer.decoder = decoders.Sequence(steps)
    _add_user_symbols(tokenizer, proto)
    if kind == "CodeLlamaTokenizer":
        tokenizer.add_special_tokens([token for token in INFILLING if token in vocabulary])
    said = {"add_bos_token", "add_eos_token"}.intersection(special.settings)
    if not said:
        warnings.warn(
            "tokenizer_config.json does not say `add_bos_token`, so no text begins with "
            f"{special.named['bos_token'].content!r}. Most models of this kind were trained with it.",
            stacklevel=5,
        )
    return tokenizer, {}


def merges_of(vocabulary):
    """The pairs that make up each piece of a vocabulary (dict from piece to id), the earliest pieces first."""
    return [
        (piece[:i], piece[i:])
        for piece in vocabulary
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]


def _add_user_symbols(tokenizer, proto):
    """Makes control symbols special, and keeps symbols of the user whole."""
    from tokenizers import AddedToken

    kinds = type(proto).SentencePiece
    symbols = [piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)]
    for piece in symbols:
        is_control = piece.type == kinds.CONTROL
        add = tokenizer.add_special_tokens if is_control else tokenizer.add_tokens
        add([AddedToken(piece.piece, normalized=False, special=is_control)])


def _known_kind(special, kinds, files, guess):
    """The kind that the files name, or where they name none, what the vocabulary looks like."""
    if special.kind is not None and special.kind not in kinds:
        raise ValueError(
            f"`tokenizer_class` must be one of {sorted(kinds)} for {files}; received {special.kind!r}. "
            "A tokenizer.json, as `transformers` writes it, would do for any kind."
        )
    return special.kind or guess()


def _kind_of_byte_pairs(vocabulary):
    if any(token.endswith("</w>") for token in vocabulary):
        return "CLIPTokenizer"
    return "RobertaTokenizer" if {"<s>", "</s>"} <= vocabulary.keys() else "GPT2Tokenizer"


def _kind_of_sentence_pieces(proto, path):
    trainer = proto.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        return "T5Tokenizer"
    if trainer.model_type != trainer.BPE:
        raise ValueError(f"{path} must be a SentencePiece model of unigrams or byte pairs.")
    return "LlamaTokenizer" if proto.normalizer_spec.add_dummy_prefix else "GemmaTokenizer"


def _with_id(tokenizer, token):
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"The vocabulary must have the special token {token!r}.")
    return token, index


def _put_around(tokenizer, special, add_eos_token=False):
    """Puts the tokens that begin and end a text around it, as far as the files ask for them."""
    from tokenizers import processors

    begin = [special.named["bos_token"].content] if special.settings.get("add_bos_token") else []
    end = [special.named["eos_token"].content] if special.settings.get("add_eos_token", add_eos_token) else []
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B:1", *end],
            special_tokens=[_with_id(tokenizer, token) for token in {*begin, *end}],
        )
