"""What tokenizers do to text before they look pieces up, as TensorFlow operations: normalizing and splitting.

The names of the parts are those of the `tokenizers` library. One that has no counterpart here is refused by its name.
"""

import re

import tensorflow as tf
import tensorflow_text

# All that Unicode calls white space, as the inside of a class of RE2, whose own \s is ASCII.
TAB_TO_RETURN = r"\t-\r"
WHITE = TAB_TO_RETURN + r" \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
# How GPT-2 splits text, of which `tokenizers` makes no mention where it does so too.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LAST_SPACE_APART = r"\s+(?!\S)|"
CHINESE = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{20000}-\x{2a6df}\x{2a700}-\x{2b73f}\x{2b740}-\x{2b81f}\x{2b920}-\x{2ceaf}"
    r"\x{f900}-\x{faff}\x{2f800}-\x{2fa1f}"
)
# No text in UTF-8 has this byte, and no pattern matches it.
MARK = b"\xff"
# One of the code points that Unicode promises never to give to a character.
NO_CHARACTER = "\ufdd0"


def refuse(part, name):
    raise ValueError(
        f"The tokenizer cannot be exported: its {part} {name} has no counterpart in TensorFlow here. Tokenize outside "
        "of the model, and export that with `keras.Model.export`."
    )


def clean(text):
    """Text whose invalid bytes are replaced, so that it holds no mark."""
    return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")


def split_out(text, pattern):
    """Cuts each of a list of texts around the matches of a pattern: ragged `[B, parts]`, every second part a match."""
    marked = tf.strings.regex_replace(text, f"({pattern})", MARK + rb"\1" + MARK)
    return tf.strings.split(marked, sep=MARK)


def places(parts):
    """The number of each part in its row, flat."""
    return tf.ragged.range(parts.row_lengths()).flat_values


def normalizer(spec):
    """The function of texts that a normalizer is; `spec` is what tokenizer.json says of it."""
    if spec is None:
        return lambda text: text
    kind = spec["type"]
    if kind == "Sequence":
        steps = [normalizer(step) for step in spec["normalizers"]]
        return lambda text: _in_turn(steps, text)
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: tensorflow_text.normalize_utf8(text, kind)
    if kind == "Lowercase":
        return lowercase
    if kind == "Prepend":
        return lambda text: tf.where(text == "", text, tf.strings.join([spec["prepend"], text]))
    if kind == "Replace":
        pattern, content = pattern_of(spec["pattern"]), spec["content"].replace("\\", r"\\")
        return lambda text: tf.strings.regex_replace(text, pattern, content)
    if kind == "BertNormalizer":
        return lambda text: _bert(text, spec)
    return refuse("normalizer", kind)


def _in_turn(steps, text):
    for step in steps:
        text = step(text)
    return text


def lowercase(text):
    # A sigma at the end of a word would become another letter than within it, and a zero would end the text.
    text = tf.strings.regex_replace(tf.strings.regex_replace(text, "Σ", "σ"), r"\x00", NO_CHARACTER)
    return tf.strings.regex_replace(tf.strings.lower(text, encoding="utf-8"), NO_CHARACTER, "\x00")


def _bert(text, spec):
    if spec["clean_text"]:
        text = tf.strings.regex_replace(text, r"[\x00\x{fffd}\p{Cf}\p{Co}\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}]", "")
        text = tf.strings.regex_replace(text, f"[{WHITE}]", " ")
    if spec["handle_chinese_chars"]:
        text = tf.strings.regex_replace(text, f"([{CHINESE}])", r" \1 ")
    if spec["lowercase"] if spec["strip_accents"] is None else spec["strip_accents"]:
        text = tf.strings.regex_replace(tensorflow_text.normalize_utf8(text, "NFD"), r"\p{Mn}", "")
    return lowercase(text) if spec["lowercase"] else text


def splitter(spec):
    """The function from texts to words, ragged `[B, words]`, that a pre-tokenizer is."""
    kind = None if spec is None else spec["type"]
    if kind == "Sequence":
        steps = [splitter(step) for step in spec["pretokenizers"]]
        return lambda text: _split_again(steps, text)
    if kind == "ByteLevel":
        split = _matches(WORDS, keeps_rest=True) if spec["use_regex"] else _whole
        return lambda text: split(_with_space(text) if spec["add_prefix_space"] else text)
    if kind == "Split":
        if (spec["behavior"].lower(), spec["invert"]) not in (("isolated", False), ("removed", True)):
            return refuse("pre-tokenizer", f"Split ({spec['behavior']}, invert={spec['invert']})")
        return _matches(spec["pattern"], keeps_rest=not spec["invert"])
    if kind == "BertPreTokenizer":
        punctuation = r"[!-/:-@\[-`{-~\p{P}]"
        return _matches(rf"{punctuation}|[^!-/:-@\[-`{{-~\p{{P}}{WHITE}]+", keeps_rest=False)
    return refuse("pre-tokenizer", kind)


def _with_space(text):
    return tf.where((text == "") | tf.strings.regex_full_match(text, "(?s) .*"), text, tf.strings.join([" ", text]))


def _whole(text):
    return tf.RaggedTensor.from_row_lengths(text, tf.ones_like(text, "int64"))


def _split_again(steps, text):
    words = _whole(text)
    for step in steps:
        words = words.with_flat_values(step(words.flat_values)).merge_dims(1, 2)
    return words


def _matches(spec, keeps_rest):
    """The function that splits texts at the matches of a pattern, and keeps what lies between them or not."""
    source = spec if isinstance(spec, str) else spec.get("Regex") or re.escape(spec["String"])
    leaves_space = LAST_SPACE_APART in source
    pattern = pattern_of({"Regex": source.replace(LAST_SPACE_APART, "")})
    # The last of several spaces goes with the word behind it, which RE2 cannot look ahead to.
    last = f"[{WHITE}]"
    if r"\s*[\r\n]+" in source:  # Which takes the new lines first.
        last = rf"[\t\x0b\x0c{WHITE.removeprefix(TAB_TO_RETURN)}]"
    space_before_word = f"([{WHITE}])({last}[^{WHITE}])"
    if leaves_space and not keeps_rest:
        return refuse("pre-tokenizer", f"Split of {source}")

    def split(text):
        if leaves_space:
            text = tf.strings.regex_replace(text, space_before_word, rb"\1" + MARK + rb"\2")
        parts = split_out(text, pattern)
        flat = parts.flat_values
        kept = (flat != "") if keeps_rest else places(parts) % 2 == 1
        return tf.ragged.boolean_mask(parts, parts.with_flat_values(kept))

    return split


def pattern_of(spec):
    """A pattern in the language of RE2, from what tokenizer.json says: `{"String": ...}` or `{"Regex": ...}`."""
    if "String" in spec:
        return re.escape(spec["String"])
    source = spec["Regex"]
    if re.search(r"\(\?(=|!|<)", source):
        return refuse("pattern", source)
    pattern, in_class = "", False
    for token in re.findall(r"\\p\{.*?\}|\\.|.", source, re.DOTALL):
        if token in (r"\s", r"\S"):
            negated = "^" if token == r"\S" else ""
            if in_class and negated:
                return refuse("pattern", source)
            token = WHITE if in_class else f"[{negated}{WHITE}]"
        in_class = token == "[" or (in_class and token != "]")
        pattern += token
    try:
        tf.strings.regex_replace("", pattern, "")
    except tf.errors.InvalidArgumentError:
        return refuse("pattern", source)
    return pattern
