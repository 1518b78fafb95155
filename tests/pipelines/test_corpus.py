"""Reading pairs: every layout gives the same pairs, and whatever does not fit is named by file and line."""

import collections
import gzip
import sys
import zipfile
from pathlib import Path

import pytest

from keras_transformer.pipelines import hold_out, number_pairs, read_pairs

PAIRS = [
    ("Go.", "Geh."),
    ("A\u2028line\x85of\x0cits own", "Eine\u2029Zeile"),
    ("\u00a0no break", "größer 🙂"),
    ("", "x"),
]
SOURCES = "".join(f"{source}\n" for source, _ in PAIRS)
TARGETS = "".join(f"{target}\n" for _, target in PAIRS)
TABLE = "".join(f"{source}\t{target}\n" for source, target in PAIRS)
WITH_LICENCE = "".join(f"{source}\t{target}\tCC-BY 2.0\tby a\tb\n" for source, target in PAIRS)


def write(path, text, encoding="utf-8"):
    data = text if isinstance(text, bytes) else text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.txt", "pairs.tsv.gz", "pairs.txt.gz"])
@pytest.mark.parametrize(
    "text",
    [TABLE, TABLE.rstrip("\n"), WITH_LICENCE, TABLE.replace("\n", "\r\n"), "\ufeff" + TABLE],
    ids=["plain", "no-last-newline", "more-columns", "windows", "byte-order-mark"],
)
def test_one_file(tmp_path, name, text):
    assert read_pairs(write(tmp_path / name, text)) == PAIRS


@pytest.mark.parametrize("source, target", [("t.en", "t.de"), ("t.en.gz", "t.de.gz"), ("t.en", "t.de.gz")])
def test_two_files(tmp_path, source, target):
    assert read_pairs(str(write(tmp_path / source, SOURCES)), write(tmp_path / target, TARGETS)) == PAIRS


@pytest.mark.parametrize(
    "members",
    [
        {"deu.txt": WITH_LICENCE, "_about.txt": "Licence\tCC\n"},
        {"_about.txt": "Licence", "deck/deu.txt": TABLE},
        {"deu.txt": TABLE, "__MACOSX/._deu.txt": b"\x00\xff\t", "notes.txt": "no columns\n", "x.csv": "a\tb"},
    ],
    ids=["anki", "folder", "clutter"],
)
def test_zip(tmp_path, members):
    assert read_pairs(write_zip(tmp_path / "deu-eng.zip", members)) == PAIRS
    compressed = write(tmp_path / "again.zip.gz", (tmp_path / "deu-eng.zip").read_bytes())
    assert read_pairs(compressed) == PAIRS


BAD_FILES = {
    "no tab": ("a\tb\n\na\tb\n", r"pairs\.tsv, line 2: .*no tab"),
    "no tab at all": ("only one language\n", r"pairs\.tsv, line 1: .*'only one language'.*give both files"),
    "undecodable": (b"a\tb\nc\td\ncaf\xe9\te\n", r"pairs\.tsv, line 3: .*UTF-8.*0xe9"),
    "cut in a character": ("a\tä".encode()[:-1], r"pairs\.tsv, line 1: .*0xc3"),
    "empty": ("", r"pairs\.tsv is empty"),
    "blank": ("\n \n", r"pairs\.tsv is empty"),
}


@pytest.mark.parametrize("text, message", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_file(tmp_path, text, message, suffix):
    path = write(tmp_path / f"pairs.tsv{suffix}", text)
    with pytest.raises(ValueError, match=message.replace(r"\.tsv", rf"\.tsv{suffix}")):
        read_pairs(path)


def test_unequal_line_counts_name_both_files_and_counts(tmp_path):
    source, target = write(tmp_path / "t.en", SOURCES), write(tmp_path / "t.de", TARGETS + "one more\n")
    with pytest.raises(ValueError, match=r"4 lines in .*t\.en and 5 lines in .*t\.de"):
        read_pairs(source, target)


def test_second_file_is_the_one_named(tmp_path):
    with pytest.raises(ValueError, match=r"t\.de, line 2"):
        read_pairs(write(tmp_path / "t.en", "a\nb\n"), write(tmp_path / "t.de", b"a\n\xff\n"))


@pytest.mark.parametrize("name", ["absent.tsv", "absent.zip", "absent.tsv.gz", "."])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.") if name != "." else str(tmp_path)):
        read_pairs(tmp_path / name)


@pytest.mark.parametrize(
    "members, found",
    [
        ({"_about.txt": "a\tb\n"}, "none"),
        ({"readme.md": "a\tb\n"}, "none"),
        ({"a.txt": "a\tb\n", "b.txt": "a\tb\n"}, r"\['a.txt', 'b.txt'\]"),
        ({}, "none"),
    ],
)
def test_zip_without_one_file_of_pairs(tmp_path, members, found):
    with pytest.raises(ValueError, match=rf"deck\.zip must hold exactly one.*found {found}"):
        read_pairs(write_zip(tmp_path / "deck.zip", members))


def test_member_of_a_zip_is_named(tmp_path):
    path = write_zip(tmp_path / "deck.zip", {"deu.txt": b"a\tb\n\xe9\tc\n"})
    with pytest.raises(ValueError, match=r"deck\.zip/deu\.txt, line 2"):
        read_pairs(path)


@pytest.mark.parametrize("name, kind", [("t.zip", "zip"), ("t.tsv.gz", "gzip")])
@pytest.mark.parametrize("damage", ["not one", "cut"])
def test_broken_archive(tmp_path, name, kind, damage):
    path = tmp_path / name
    if damage == "not one":
        path.write_bytes(b"a\tb\n")
    else:
        whole = write_zip(path, {"a.txt": TABLE * 50}) if kind == "zip" else write(path, TABLE * 50)
        path.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{name} is not a whole {kind} file"):
        read_pairs(path)


def test_number_names():
    pairs = number_pairs(500, "fr")
    assert len(set(pairs)) == len({source for source, _ in pairs}) == 500
    assert pairs == number_pairs(500, "fr")
    assert pairs != number_pairs(500, "fr", seed=1)
    everything = dict(number_pairs(101, "de", highest=100))
    assert everything["zero"] == "null" and everything["one hundred"] == "einhundert"
    assert len(everything) == 101


def test_number_names_have_every_magnitude():
    counts = collections.Counter()
    for name, _ in number_pairs(2000, "fr"):
        thousands, thousand, _ = name.partition(" thousand")
        counts[bool(thousand), "hundred" in thousands] += 1
    # Below a hundred; hundreds; below and above a hundred thousand.
    assert counts[False, False] > 90
    assert min(counts.values()) > 90 and len(counts) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"count": 5, "language": "klingon"}, r"`language` must be one of .*de, .*fr,.*'klingon'"),
        ({"count": 12, "highest": 10}, r"`count` must lie between 1 and 11.*received 12"),
        ({"count": 0}, "`count`"),
    ],
)
def test_number_names_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        number_pairs(**arguments)


def test_number_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ImportError, match="pip install num2words"):
        number_pairs(3)


def test_hold_out_shares_no_source():
    pairs = [(f"s{i % 30}", f"t{i}") for i in range(90)]
    train, held_out = hold_out(pairs, 7, seed=3)
    assert len(held_out) == 7 and len(train) == 90 - 3 * 7
    assert not {source for source, _ in train} & {source for source, _ in held_out}
    assert set(train) <= set(pairs) and set(held_out) <= set(pairs[:30])
    assert (train, held_out) == hold_out(pairs, 7, seed=3) != hold_out(pairs, 7, seed=4)
    for count in (0, 30):
        with pytest.raises(ValueError, match="between 1 and 29"):
            hold_out(pairs, count)


def test_corpora_beside_the_checkout():
    """Where the public corpora lie in a `shared/data` folder above this one, they are read whole."""
    counts = {
        ("tatoeba/deu-eng.zip",): 169_813,
        ("tatoeba/fra-eng.zip",): 142_787,
        ("multi30k/train.en.gz", "multi30k/train.de.gz"): 29_000,
        ("multi30k_bpe10k/train.en", "multi30k_bpe10k/train.de"): 29_000,
    }
    folders = [folder / "shared" / "data" for folder in Path(__file__).resolve().parents]
    folders = [folder for folder in folders if folder.is_dir()]
    for names, count in counts.items():
        if folders and (folders[0] / names[0]).exists():
            pairs = read_pairs(*(folders[0] / name for name in names))
            assert len(pairs) == count
            assert all(source.strip() and target.strip() for source, target in pairs)
