"""Reading and making parallel text: lists of (source, target) pairs of strings."""

import gzip
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_pairs(source, target=None):
    """Reads parallel text from one file of pairs or from two line-aligned files.

    Three layouts are understood, each of them also compressed as `.gz`:

    - one text file whose lines hold the source, a tab and the target; columns beyond the second are ignored,
    - an Anki or Tatoeba `.zip`, which holds one such file beside an `_about.txt`,
    - two files (`source` and `target`) in which line *n* of one translates line *n* of the other.

    Files are UTF-8. Only a newline ends a line (a carriage return before it belongs to the line's end), so sentences
    may hold any other Unicode separator. Nothing is replaced or dropped silently: a file that does not fit raises.

    Args:
        source: String or path. The file of pairs or, if `target` is given, the file of source sentences.
        target: Optional string or path. The file of target sentences.

    Returns:
        A list of `(source, target)` tuples of strings, in the order of the file.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is empty, is not valid UTF-8, has a line without a tab, is a broken archive or one
            without a file of pairs, or if two files differ in their number of lines.

    Example:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.tsv")
    >>> _ = path.write_text("Go.\\tGeh.\\nHi!\\tHallo!\\n", encoding="utf-8")
    >>> read_pairs(path)
    [('Go.', 'Geh.'), ('Hi!', 'Hallo!')]
    """
    if target is None:
        return _split_columns(*_read_text(source))
    source_name, source_lines = _read_text(source)
    target_name, target_lines = _read_text(target)
    if len(source_lines) != len(target_lines):
        raise ValueError(
            "Line-aligned files must have the same number of lines; received "
            f"{len(source_lines)} lines in {source_name} and {len(target_lines)} lines in {target_name}."
        )
    return list(zip(source_lines, target_lines, strict=True))


def _read_text(path):
    """Returns the name to report a file by, and its lines without their ends."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    name, data, layout = str(path), path.read_bytes(), path
    if path.suffix == ".gz":
        layout = path.with_suffix("")
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is not a whole gzip file: {error}.") from error
    if layout.suffix == ".zip":
        name, data = _read_archive(name, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}, line {line}: the file must be UTF-8; received the byte 0x{data[error.start]:02x}, "
            f"which cannot be decoded ({error.reason})."
        ) from error
    if not text.strip():
        raise ValueError(f"{name} is empty; a file of sentences must hold at least one line.")
    # `str.splitlines` would also break sentences at U+2028, U+0085 and others.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return name, [line.removesuffix("\r") for line in lines]


def _read_archive(name, data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # Names that begin with `_` or `.` are the licence notice and what file managers leave behind.
            texts = [n for n in archive.namelist() if n.endswith(".txt") and Path(n).name[0] not in "_."]
            members = [member for member in texts if b"\t" in archive.open(member).readline()]
            if len(members) != 1:
                raise ValueError(
                    f"{name} must hold exactly one tab-separated `.txt` file of pairs; found {members or 'none'} "
                    f"among {archive.namelist()}."
                )
            return f"{name}/{members[0]}", archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{name} is not a whole zip file: {error}.") from error


def _split_columns(name, lines):
    pairs = []
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t", 2)
        if len(columns) < 2:
            raise ValueError(
                f"{name}, line {number}: a line must hold a source, a tab and a target; received {line[:80]!r}, which "
                "has no tab. If the translations stand in a second, line-aligned file, give both files."
            )
        pairs.append((columns[0], columns[1]))
    return pairs


def number_pairs(count, language="fr", highest=999_999, seed=0):
    """Makes pairs of number names, English to another language, whose every answer can be checked.

    The numbers are distinct, lie between 0 and `highest` and are drawn with a probability that falls as one over
    their size, so that each order of magnitude has about the same share. The names come from the `num2words` package.

    Args:
        count: Integer. How many pairs to make, at most `highest + 1`.
        language: String. The target language as `num2words` calls it, such as `"fr"`, `"de"` or `"pt_BR"`.
        highest: Integer. The largest number to name.
        seed: Integer. The same seed gives the same pairs in the same order.

    Returns:
        A list of `(English name, name in the language)` tuples, in random order.

    Raises:
        ImportError: If `num2words` is not installed.
        ValueError: If `num2words` does not know the language, or `count` is out of range.

    Example:

    >>> number_pairs(3, "fr", highest=20)
    [('eleven', 'onze'), ('two', 'deux'), ('three', 'trois')]
    """
    try:
        import num2words
    except ImportError as error:
        raise ImportError(
            "Number names need the `num2words` package. Install it with `pip install num2words`."
        ) from error
    known = sorted(num2words.CONVERTER_CLASSES)
    if language not in known:
        raise ValueError(f"`language` must be one of {', '.join(known)}; received {language!r}.")
    if not 0 < count <= highest + 1:
        raise ValueError(
            f"`count` must lie between 1 and {highest + 1}, as many as there are numbers up to `highest`={highest}; "
            f"received {count}."
        )
    random = np.random.default_rng(seed)
    # Sorting by exponential variables divided by weights is a weighted draw without replacement (Efraimidis and
    # Spirakis, 2006); the weight of a number n is 1 / (n + 1).
    order = np.argsort(random.exponential(size=highest + 1) * np.arange(1, highest + 2), kind="stable")
    numbers = random.permutation(order[:count]).tolist()
    return [(num2words.num2words(n, lang="en"), num2words.num2words(n, lang=language)) for n in numbers]


def hold_out(pairs, count, seed=0):
    """Splits pairs into a part to train on and a held-out part that shares no source sentence with it.

    Corpora such as Tatoeba give several translations of one sentence. A held-out sentence keeps its first
    translation, and none of the others stays in the training part.

    Args:
        pairs: List of `(source, target)` tuples.
        count: Integer. How many distinct source sentences to hold out.
        seed: Integer. The same seed holds out the same sentences.

    Returns:
        A tuple `(train, held_out)` of lists of pairs, both in the order of `pairs`.

    Raises:
        ValueError: If holding out `count` sentences would leave nothing to train on.

    Example:

    >>> train, held_out = hold_out([("a", "x"), ("b", "y"), ("a", "z")], 1, seed=0)
    >>> train, held_out
    ([('a', 'x'), ('a', 'z')], [('b', 'y')])
    """
    first = {}
    for source, target in pairs:
        first.setdefault(source, target)
    if not 0 < count < len(first):
        raise ValueError(
            f"`count` must lie between 1 and {len(first) - 1}, one less than there are distinct source sentences; "
            f"received {count}."
        )
    sources = list(first)
    chosen = {sources[i] for i in np.random.default_rng(seed).choice(len(sources), size=count, replace=False)}
    train = [pair for pair in pairs if pair[0] not in chosen]
    return train, [(source, target) for source, target in first.items() if source in chosen]
