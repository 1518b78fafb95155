"""Loss of a small translator in float32 and in half precision, step by step, on the backend that `KERAS_BACKEND` names.

    python benchmarks/mixed_precision.py

The same model with the same weights learns the French names of numbers, letter by letter, from the same batches under
each policy. Losses are means over the last 20 steps; the relative difference to float32 is beside them.
"""

import argparse
import itertools

import keras
import numpy as np

import keras_transformer as kt

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
SIZES = {"dim": 64, "depth": 2, "num_heads": 4, "hidden_dim": 128, "norm_position": "pre"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="(default: 200)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    arguments = parser.parse_args()
    pairs = kt.pipelines.number_pairs(4000)
    letters = sorted(set("".join(itertools.chain.from_iterable(pairs))))
    numbers = {letter: number for number, letter in enumerate(letters, start=3)}
    source, target = ([[numbers[letter] for letter in text] for text in side] for side in zip(*pairs, strict=True))
    base = None
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        size = len(numbers) + 3
        model = kt.models.transformer(size, size, **SIZES, dropout=arguments.dropout)
        model.compile(keras.optimizers.Adam(1e-3), kt.training.SmoothedCrossEntropy(0.0))
        batches = itertools.cycle(kt.pipelines.token_batches(source, target, 1024, length_multiple=16))
        losses = []
        for inputs, labels in itertools.islice(batches, arguments.steps):
            model.reset_metrics()
            inputs = {name: np.asarray(ids) for name, ids in inputs.items()}
            losses.append(float(model.train_on_batch(inputs, np.asarray(labels))))
        last = np.mean(losses[-20:])
        base = last if base is None else base
        finite = np.isfinite(losses).sum()
        print(f"{policy:15} first {losses[0]:.4f}  last {last:.4f}  {last / base - 1:+.2%}  {finite} of {len(losses)} "
              f"losses finite, {type(model.optimizer).__name__}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
