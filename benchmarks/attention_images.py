"""What `AttentionImages` costs: the time of training with it, as a share of that without, in the same run.

    python benchmarks/attention_images.py --every 100

A language model of 4 blocks of width 128 trains on random tokens, in turn with and without the callback.
"""

import argparse
import statistics
import tempfile
import time

import keras
import numpy as np

import keras_transformer as kt


class Clock(keras.callbacks.Callback):
    """Seconds of the steps after the first one, which compiles, and of what other callbacks do after them."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.start = time.perf_counter()

    def on_train_end(self, logs=None):
        self.seconds = time.perf_counter() - self.start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100, help="steps from one writing to the next (default: 100)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind (default: 3)")
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(1, 1000, (32 * arguments.steps, 64)).astype("int32")
    model = kt.models.causal_lm(1000, dim=128, depth=4, num_heads=4, hidden_dim=512)
    model.compile("adam", kt.training.SmoothedCrossEntropy())
    seconds = {"with": [], "without": []}
    for _ in range(arguments.rounds):
        for name, found in seconds.items():
            clock, callbacks = Clock(), []
            if name == "with":
                images = kt.training.AttentionImages(tempfile.mkdtemp(), ids[:1], ids[:1], every=arguments.every)
                callbacks.append(images)
            model.fit(ids, ids, batch_size=32, verbose=0, shuffle=False, callbacks=[clock, *callbacks])
            found.append(clock.seconds)
    for name, found in seconds.items():
        print(f"{name:8}", *(f"{x:.2f}" for x in found), "seconds")
    ratio = statistics.median(seconds["with"]) / statistics.median(seconds["without"])
    print(f"{100 * (ratio - 1):+.1f}% time, written every {arguments.every} steps")


if __name__ == "__main__":
    main()
