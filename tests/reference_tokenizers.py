"""Small real tokenizers, trained on a few sentences and written as the files that checkpoints have of them."""

import io
import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "A man reads a book on the train.",
    "Two dogs run in the park, don't they?",
    "The café's naïve owner sells crème brûlée — 25 € each!",
    "It's 3:45 p.m.; the  year is 2024 and we've got\n\tnew lines.",
    "Ein Mann liest ein Buch über Züge.",
    "日本語のテキスト and emoji 🙂 here",
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_json(directory, name, content):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_byte_pairs(directory, special=("<|endoftext|>",), size=380):
    """`vocab.json` and `merges.txt` as GPT-2 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(tokenizer, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=BYTES))
    return _write_merges(directory, tokenizer)


def write_clip(directory):
    """`vocab.json` and `merges.txt` of words with an end, as CLIP has them."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    options = {"vocab_size": 700, "end_of_word_suffix": "</w>", "initial_alphabet": BYTES}
    _train(tokenizer, trainers.BpeTrainer(**options))
    ends = [f"{letter}</w>" for letter in BYTES]
    return _write_merges(directory, tokenizer, [*ends, "<|startoftext|>", "<|endoftext|>"])


def _train(tokenizer, trainer):
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)


def _write_merges(directory, tokenizer, added=()):
    model = json.loads(tokenizer.to_str())["model"]
    for token in added:
        model["vocab"].setdefault(token, len(model["vocab"]))
    write_json(directory, "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return model["vocab"]


def write_word_pieces(directory, lowercase=True):
    """`vocab.txt` as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special))
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return vocabulary


def write_sentence_pieces(path, **options):
    """A SentencePiece model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_t5(directory):
    return write_sentence_pieces(directory / "spiece.model", vocab_size=150, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


# Pieces merged from characters, with bytes where there is none, and text as it is.
MERGED = {
    "model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip


def write_llama(directory, **options):
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    return write_sentence_pieces(directory / "tokenizer.model", **{**MERGED, **ids, **options})


def write_gemma(directory, **options):
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
    options = {"add_dummy_prefix": False, "user_defined_symbols": ["<mask>", "<image>", "\n\n"], **options}
    return write_sentence_pieces(directory / "tokenizer.model", **{**MERGED, **ids, **options})


def write_marian(directory):
    """Two SentencePiece models, and one vocabulary of their pieces."""
    vocabulary = {"</s>": 0, "<unk>": 1}
    for side in ("source", "target"):
        pieces = write_sentence_pieces(directory / f"{side}.spm", vocab_size=150 if side == "source" else 170)
        for i in range(3, pieces.get_piece_size()):
            vocabulary.setdefault(pieces.id_to_piece(i), len(vocabulary))
    for token in (">>deu<<", "<pad>"):
        vocabulary[token] = len(vocabulary)
    write_json(directory, "vocab.json", vocabulary)
    return vocabulary
