"""How many real tokens a translator learns from in a second: packed rows against padding, on the same sentences.

    python benchmarks/packing.py --data multi30k_bpe10k/train.en multi30k_bpe10k/train.de

The two files hold a sentence a line, split into subwords already. Three ways to make batches of about as many tokens,
each with the same model: sentences in any order, padded to the longest of their batch; sentences of similar lengths,
padded (`token_batches`); and packed rows (`packed_batches`). They take turns; a rate is the real target tokens of all
steps over their time.
"""

import argparse
import collections
import itertools
import statistics
import time

import keras
import numpy as np
import tensorflow as tf
from keras.utils import pad_sequences

import keras_transformer as kt

SIZES = {"dim": 128, "num_heads": 4, "hidden_dim": 256, "dropout": 0.1}  # The translation example's `tiny`.


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs=2, required=True, metavar="FILE", help="source and target sentences")
    parser.add_argument("--pairs", type=int, help="the first so many (default: all)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch on either side (default: 4096)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128], help="of packed rows (default: 64 128)")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (default: 20)")
    parser.add_argument("--repeat", type=int, default=2, help="turns of each (default: 2)")
    parser.add_argument("--depth", type=int, default=4, help="blocks of encoder and of decoder (default: 4)")
    parser.add_argument("--jit-compile", action="store_true", help="by XLA, for each shape of a batch")
    arguments = parser.parse_args()
    source, target = (read(name)[: arguments.pairs] for name in arguments.data)
    words = collections.Counter(itertools.chain.from_iterable(source + target))
    numbers = {word: number for number, word in enumerate(words, start=3)}
    source, target = ([[numbers[word] for word in text] for text in side] for side in (source, target))
    lengths = [len(text) + 1 for text in target]
    print(f"{len(target)} pairs, {np.mean(lengths):.1f} target tokens in each, at most {max(lengths)}")
    ways = {
        "any order, padded": any_order(source, target, arguments.tokens),
        "similar lengths, padded": kt.pipelines.token_batches(source, target, arguments.tokens),
    }
    for length in arguments.lengths:
        rows = arguments.tokens // length
        ways[f"packed, rows of {length}"] = kt.pipelines.packed_batches(source, target, length, rows)
    rates = time_in_turns(ways, len(numbers) + 3, arguments)
    slowest = statistics.median(rates["any order, padded"])
    for name, found in rates.items():
        share, rate = real_share(ways[name]), statistics.median(found)
        turns = ", ".join(f"{x:,.0f}" for x in found)
        print(f"{name:24} {100 * share:5.1f}% real  {rate:8,.0f} tokens/s ({turns})  {rate / slowest:.2f}")


def read(name):
    with open(name, encoding="utf-8") as file:
        return [line.split() for line in file]


def any_order(source, target, tokens):
    """A list of batches of sentences as they come after shuffling, about `tokens` of which fit a batch with padding."""
    longest = max(map(len, source + target)) + 1
    count = max(1, tokens // (longest // 2))
    order = np.random.default_rng(0).permutation(len(source))
    batches = []
    for i in range(0, len(order), count):
        sources = pad_sequences([[*source[k], 2] for k in order[i : i + count]], padding="post")
        rows = pad_sequences([[1, *target[k], 2] for k in order[i : i + count]], padding="post")
        said = np.where(rows[:, 1:] == 0, 0, rows[:, :-1])  # The last token of a target is not read.
        batches.append(({"source_ids": sources, "target_ids": said}, rows[:, 1:]))
    return batches


def real_share(batches):
    """The share of all tokens that is no padding, source and target."""
    real = total = 0
    for inputs, _ in batches:
        for name in ("source_ids", "target_ids"):
            ids = np.asarray(inputs[name])
            real, total = real + (ids != 0).sum(), total + ids.size
    return real / total


def time_in_turns(ways, vocabulary, arguments):
    """Real target tokens a second of each way, in each turn."""
    runs, rates = {}, {name: [] for name in ways}
    for name, batches in ways.items():
        keras.utils.set_random_seed(0)
        model = kt.models.transformer(vocabulary, vocabulary, depth=arguments.depth, **SIZES)
        model = kt.models.packed(model) if name.startswith("packed") else model
        model.compile("adam", kt.training.SmoothedCrossEntropy(), jit_compile=arguments.jit_compile)
        chosen = [keras.tree.map_structure(np.asarray, batch) for batch in itertools.islice(batches, arguments.steps)]
        runs[name] = model, dataset(chosen), sum((labels != 0).sum() for _, labels in chosen)
        model.fit(runs[name][1].take(1), shuffle=False, verbose=0)  # Traces it.
    for _ in range(arguments.repeat):
        for name, (model, batches, tokens) in runs.items():
            begin = time.perf_counter()
            model.fit(batches, shuffle=False, verbose=0)
            rates[name].append(tokens / (time.perf_counter() - begin))
    return rates


def dataset(batches):
    """Batches in memory as a dataset, whose shapes TensorFlow is not told of: a step is traced once for all."""
    signature = keras.tree.map_structure(lambda _: tf.TensorSpec((None, None), "int32"), batches[0])
    rows = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    return rows.apply(tf.data.experimental.assert_cardinality(len(batches)))


if __name__ == "__main__":
    main()
