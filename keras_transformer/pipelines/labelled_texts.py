"""Texts and their classes: read from files, made from the names of emoji, and split."""

import csv
import json
import re
from pathlib import Path

import numpy as np

from keras_transformer.pipelines.corpus import _read_text

FORMATS = (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
LATIN_LANGUAGES = ("en", "de", "fr", "es", "pt", "it", "id", "tr")
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")


def read_labelled_texts(path, known=None):
    """Reads texts and their labels from a file.

    - `.jsonl`: each line is a JSON object with `label`, a string or an integer, and `text`. Other keys are ignored.
    - `.csv`: commas part the columns, quotes hold a text with commas or new lines together, a quote within is doubled.
    - `.tsv`: tabs part the columns, and a quote is a character like any other.

    All of them may be compressed as `.gz`, and are UTF-8. If the first row of a table has one column named `label` and
    one named `text`, in any case and order, it is a header: these two columns are read, whatever others there are. If
    not, the table has no header and exactly two columns, the label and then the text.

    Args:
        path: str or path.
        known: strings, the only labels that there may be; None for any.

    Returns:
        A tuple `(texts, labels)` of lists of strings, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the format is unknown, or a line cannot be read, lacks a label or has an empty text. The message
            names file and line.

    Example:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = path.write_text('text,label\\n"Long, and dull.",bad\\nA delight!,good\\n')
    >>> read_labelled_texts(path)
    (['Long, and dull.', 'A delight!'], ['bad', 'good'])
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise ValueError(f"A file of labelled texts must be one of {', '.join(FORMATS)}; received {path}.")
    name, lines = _read_text(path)
    rows = _json_rows(name, lines) if suffix.startswith(".jsonl") else _table_rows(name, lines, suffix)
    texts, labels = [], []
    for number, label, text in rows:
        if not isinstance(label, str | int) or isinstance(label, bool) or not str(label).strip():
            raise ValueError(f"{name}, line {number}: a label must be a string or an integer; received {label!r}.")
        if known is not None and str(label).strip() not in known:
            raise ValueError(f"{name}, line {number}: a label must be one of {list(known)}; received {label!r}.")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}, line {number}: a text must be a string that is not empty; received {text!r}.")
        texts.append(text)
        labels.append(str(label).strip())
    if not texts:
        raise ValueError(f"{name} must hold labelled texts; received a header alone.")
    return texts, labels


def _json_rows(name, lines):
    """Yields the number, the label and the text of each line."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: a line must be a JSON object; {error}.") from error
        if not isinstance(row, dict) or "label" not in row or "text" not in row:
            raise ValueError(f"{name}, line {number}: a line must have `label` and `text`; received {line[:80]!r}.")
        yield number, row["label"], row["text"]


def _table_rows(name, lines, suffix):
    """Yields the number of the line where it begins, the label and the text of each row."""
    options = {"strict": True} if suffix.startswith(".csv") else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader((f"{line}\n" for line in lines), **options)
    places, width, begin = None, None, 1
    try:
        for row in reader:
            number, begin = begin, reader.line_num + 1
            if places is None:
                header = [column.strip().lower() for column in row]
                has_header = header.count("label") == header.count("text") == 1
                places = (header.index("label"), header.index("text")) if has_header else (0, 1)
                width = len(header) if has_header else 2
                if has_header:
                    continue
            if len(row) != width:
                raise ValueError(
                    f"{name}, line {number}: a row must have {width} columns, as the header has; without a header with "
                    f"`label` and `text`, the label and then the text. Received {len(row)}: {str(row)[:80]}."
                )
            yield number, row[places[0]], row[places[1]]
    except csv.Error as error:
        raise ValueError(f"{name}, line {begin}: the row that begins here is broken: {error}.") from error


def emoji_names(languages=LATIN_LANGUAGES):
    """The names of emoji in several languages, to tell the languages apart by.

    Emoji that differ from another in the tone of a skin alone are left out, as their names differ from its name by the
    same few words. Some names are the same in several languages, which nobody can tell apart then.

    Args:
        languages: strings, as the `emoji` package calls them. By default eight that are written in Latin letters, so
            that the script alone says nothing.

    Returns:
        List of tuples `(name, language, emoji)`, ordered by emoji.

    Raises:
        ImportError: if `emoji` is not installed.
        ValueError: if `emoji` does not know a language, or there are fewer than two.

    Example:

    >>> [(name, language) for name, language, emoji in emoji_names(["en", "de"]) if emoji == "🎂"]
    [('birthday cake', 'en'), ('geburtstagskuchen', 'de')]
    """
    try:
        import emoji
    except ImportError as error:
        raise ImportError("Names of emoji need the `emoji` package. Install it with `pip install emoji`.") from error
    if len(set(languages)) < 2 or not set(languages) <= set(emoji.LANGUAGES):
        raise ValueError(
            f"`languages` must be two or more of {', '.join(sorted(emoji.LANGUAGES))}; received {list(languages)}."
        )
    for language in languages:
        emoji.config.load_language(language)
    return [
        (names[language].strip(":").replace("_", " "), language, character)
        for character, names in sorted(emoji.EMOJI_DATA.items())
        if names["status"] == emoji.STATUS["fully_qualified"] and not SKIN_TONES.search(character)
        for language in languages
        if language in names
    ]


def split_by_group(rows, groups, share=0.2, seed=0):
    """Splits rows into a part to train on and a held-out part, so that no group is in both.

    Args:
        rows: list of anything.
        groups: list of what each row belongs to, such as the emoji that it names, or its text where texts repeat.
        share: float between 0 and 1. Which part of the groups to hold out.
        seed: int. The same seed holds out the same groups.

    Returns:
        A tuple `(train, held_out)` of lists of rows, both in the order of `rows`.

    Raises:
        ValueError: if the two lists differ in length, or one of the parts would be empty.

    Example:

    >>> split_by_group(["cake", "Kuchen", "dog", "Hund"], ["🎂", "🎂", "🐕", "🐕"], share=0.5)
    (['cake', 'Kuchen'], ['dog', 'Hund'])
    """
    if len(rows) != len(groups):
        raise ValueError(f"`groups` must have one for each row; received {len(groups)} for {len(rows)} rows.")
    distinct = list(dict.fromkeys(groups))
    count = round(share * len(distinct))
    if not 0 < count < len(distinct):
        raise ValueError(
            f"`share` must hold out at least one of the {len(distinct)} groups and leave one; received share={share}."
        )
    chosen = {distinct[i] for i in np.random.default_rng(seed).choice(len(distinct), count, replace=False)}
    parts = [], []
    for row, group in zip(rows, groups, strict=True):
        parts[group in chosen].append(row)
    return parts
