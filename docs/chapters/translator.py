"""The translator of the chapters: names of numbers from 100 to 999, English to German, which it learns in a minute."""

import keras
import numpy as np

import keras_transformer as kt

DIGITS = {
    "one": "ein",
    "two": "zwei",
    "three": "drei",
    "four": "vier",
    "five": "fünf",
    "six": "sechs",
    "seven": "sieben",
    "eight": "acht",
    "nine": "neun",
}
TENS = {
    "twenty": "zwanzig",
    "thirty": "dreißig",
    "forty": "vierzig",
    "fifty": "fünfzig",
    "sixty": "sechzig",
    "seventy": "siebzig",
    "eighty": "achtzig",
    "ninety": "neunzig",
}
# German names the ones before the tens: 432 is "vier hundert zwei und dreißig".
PAIRS = [
    (f"{hundreds} hundred and {tens} {ones}", f"{DIGITS[hundreds]} hundert {DIGITS[ones]} und {TENS[tens]}")
    for hundreds in DIGITS
    for tens in TENS
    for ones in DIGITS
]
SOURCE = ["<pad>", "<start>", "<end>", "hundred", "and", *DIGITS, *TENS]
TARGET = ["<pad>", "<start>", "<end>", "hundert", "und", *DIGITS.values(), *TENS.values()]


def ids(texts, words):
    """A row of numbers for each text; all texts here have five words."""
    return np.array([[words.index(word) for word in text.split()] for text in texts], "int32")


def split(pairs, seed=0):
    """Pairs to train on, and 60 held out."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[60:]], [pairs[i] for i in order[:60]]


def build():
    keras.utils.set_random_seed(0)
    sizes = {"dim": 48, "depth": 2, "num_heads": 2, "hidden_dim": 96}
    return kt.models.transformer(len(SOURCE), len(TARGET), **sizes, norm_position="pre", dropout=0.0)


def train(model, pairs, epochs=25):
    sources, targets = ids([pair[0] for pair in pairs], SOURCE), ids([pair[1] for pair in pairs], TARGET)
    starts, ends = np.full((len(pairs), 1), 1, "int32"), np.full((len(pairs), 1), 2, "int32")
    inputs = {"source_ids": sources, "target_ids": np.concatenate([starts, targets], axis=1)}
    model.compile(keras.optimizers.Adam(2e-3), kt.training.SmoothedCrossEntropy(0.0))
    model.fit(inputs, np.concatenate([targets, ends], axis=1), batch_size=32, epochs=epochs, verbose=0)


def translate(model, texts):
    generator = kt.generation.Generator(model, 1, 2)
    rows = generator.generate({"source_ids": ids(texts, SOURCE)}, 7)
    return [" ".join(TARGET[i] for i in row if i > 2) for row in np.asarray(rows)]


def trace(model, text, translation):
    """What the model does when it has read the text and written the translation so far."""
    source, target = ids([text], SOURCE), ids([f"<start> {translation}"], TARGET)
    tokens = {"source_ids": text.split(), "target_ids": ["<start>", *translation.split()]}
    return kt.inspection.trace(model, {"source_ids": source, "target_ids": target}, tokens, vocabulary=TARGET)
