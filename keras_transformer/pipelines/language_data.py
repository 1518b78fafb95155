"""From files of text or source code to the windows of tokens that a language model learns from."""

import itertools
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_transformer.pipelines.batching import numbered_generators, prefetched

END_OF_TEXT = "<|endoftext|>"
PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
SPECIAL = ("<|padding|>", END_OF_TEXT, PREFIX, SUFFIX, MIDDLE)
END_OF_TEXT_ID, PREFIX_ID, SUFFIX_ID, MIDDLE_ID = range(1, 5)


def read_texts(path, suffix=".txt"):
    """Reads a text file, or all of those in a folder.

    Args:
        path: str or path of a file, or of a folder, which is searched with all its folders.
        suffix: str. How the names of the files in a folder end.

    Returns:
        List of str, the texts, by the names of their files.

    Raises:
        FileNotFoundError: if there is neither such a file nor a folder with such files.
        ValueError: if a file is empty or not UTF-8. In a folder, empty files are left out.

    Example:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "poem.txt")
    >>> _ = path.write_text("Shall I compare thee\\nto a summer's day?\\n")
    >>> read_texts(path) == read_texts(path.parent)
    True
    """
    path = Path(path)
    if path.is_file():
        text = _read(path)
        if not text.strip():
            raise ValueError(f"{path} is empty; a model needs text to learn from.")
        return [text]
    files = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []
    texts = [text for text in map(_read, filter(Path.is_file, files)) if text.strip()]
    if not texts:
        raise FileNotFoundError(f"There is neither a file {path} nor a folder with texts in files *{suffix} there.")
    return texts


def _read(path):
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: the file must be UTF-8; received the byte 0x{data[error.start]:02x}."
        ) from error


def train_byte_pairs(texts, vocabulary_size):
    """Trains a tokenizer of byte pairs, which loses nothing: any text is told back as it was.

    Ids 0 to 4 stand for padding, the end of a text, and the beginnings of what is before, behind and in a hole (see
    `fill_in_the_middle`); 256 for single bytes. With 261 tokens the model reads bytes.

    Reference: [Language Models are Unsupervised Multitask
    Learners](https://openai.com/research/better-language-models), section 2.2.

    Args:
        texts: iterable of str.
        vocabulary_size: int, at least 261. A small corpus gives fewer tokens.

    Returns:
        `tokenizers.Tokenizer`.

    Raises:
        ValueError: if `vocabulary_size` is too small.

    Example:

    >>> tokenizer = train_byte_pairs(["def add(a, b):\\n    return a + b\\n"] * 9, 280)
    >>> tokenizer.decode(tokenizer.encode("def bad(a):\\n\\treturn").ids)
    'def bad(a):\\n\\treturn'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL)
    if vocabulary_size < smallest:
        raise ValueError(
            f"`vocabulary_size` must be at least {smallest}, for all bytes and the special tokens; received "
            f"{vocabulary_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer, texts):
    """The tokens of all texts in one row, each text with an end.

    Args:
        tokenizer: `tokenizers.Tokenizer` of `train_byte_pairs`.
        texts: list of str.

    Returns:
        Array int32 `[tokens]`.

    Example:

    >>> tokenizer = train_byte_pairs(["ab"], 261)
    >>> token_stream(tokenizer, ["a", "a"]).tolist() == [tokenizer.token_to_id("a"), 1] * 2
    True
    """
    rows = (encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    return np.fromiter(itertools.chain.from_iterable([*row, END_OF_TEXT_ID] for row in rows), "int32")


def token_windows(ids, length, batch_size, shuffle=True, seed=0, middle_rate=0.0, first_batch=0):
    """Cuts a long row of tokens into batches of windows, with the token that follows each token as its label.

    Args:
        ids: int array `[tokens]`.
        length: int. Tokens in a window.
        batch_size: int. Windows in a batch.
        shuffle: boolean. Whether windows begin anywhere, and come without end; otherwise they follow each other, and
            what fills no window at the end is left out.
        seed: int. The same seed gives the same windows.
        middle_rate: float. The share of windows in which the middle stands at the end (see `fill_in_the_middle`).
        first_batch: int. Which of the batches without end is the first, for a training that is resumed.

    Returns:
        `tf.data.Dataset` of `(inputs, labels)`, each int32 `[batch, length]`.

    Raises:
        ValueError: if there are too few tokens for one window, or a number is out of range.

    Example:

    >>> inputs, labels = next(iter(token_windows(np.arange(5, 12), 3, 2, shuffle=False)))
    >>> inputs.numpy().tolist(), labels.numpy().tolist()
    ([[5, 6, 7], [8, 9, 10]], [[6, 7, 8], [9, 10, 11]])
    """
    ids = np.asarray(ids, "int32")
    if length < 1 or batch_size < 1 or not 0 <= middle_rate <= 1:
        raise ValueError(
            "`length` and `batch_size` must be positive, and `middle_rate` between 0 and 1; received length="
            f"{length}, batch_size={batch_size}, middle_rate={middle_rate}."
        )
    if len(ids) <= length:
        raise ValueError(f"`ids` must hold more than length={length} tokens to cut windows of; received {len(ids)}.")

    def begins():
        if shuffle:
            for random in numbered_generators(seed, first_batch):
                yield random.integers(0, len(ids) - length, batch_size), random
        starts, random = np.arange(0, len(ids) - length, length), np.random.default_rng(seed)
        for i in range(0, len(starts), batch_size):
            yield starts[i : i + batch_size], random

    def batches():
        for starts, random in begins():
            windows = ids[starts[:, None] + np.arange(length + 1)]  # [B, length + 1]
            for i in np.flatnonzero(random.random(len(windows)) < middle_rate):
                windows[i] = fill_in_the_middle(windows[i, :-4], random)
            yield windows[:, :-1], windows[:, 1:]

    signature = (tf.TensorSpec((None, length), "int32"),) * 2
    return prefetched(tf.data.Dataset.from_generator(batches, output_signature=signature))


def fill_in_the_middle(ids, random):
    """Moves the middle of a window to its end, so that a model learns to fill a hole from what is around it.

    The result is prefix, suffix and middle, each behind a token that says which it is, and an end: four tokens more.

    Reference: [Efficient Training of Language Models to Fill in the Middle](https://arxiv.org/abs/2207.14255),
    section 3.

    Args:
        ids: int array `[tokens]`.
        random: `numpy.random.Generator`, which draws the two places to cut at.

    Returns:
        int array `[tokens + 4]`.

    Example:

    >>> fill_in_the_middle(np.arange(10, 16), np.random.default_rng(2)).tolist()
    [2, 10, 3, 15, 4, 11, 12, 13, 14, 1]
    """
    begin, end = sorted(random.integers(0, len(ids) + 1, 2))
    parts = [[PREFIX_ID], ids[:begin], [SUFFIX_ID], ids[end:], [MIDDLE_ID], ids[begin:end], [END_OF_TEXT_ID]]
    return np.concatenate(parts).astype("int32")
