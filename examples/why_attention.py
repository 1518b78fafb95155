"""Why attention: an LSTM, a GRU and a Transformer of equal size, side by side, at remembering what was long ago.

    python examples/why_attention.py

Each sequence holds four facts in a long row of noise, and ends with a question about one of them. Three claims are
measured: that attention learns to answer whatever the distance, that a gradient reaches a distant token undiminished,
and that a step of training takes longer the longer the sequence is, but without a chain of states to walk.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_transformer as kt

FACTS, VALUES, NOISE = 4, 8, 16
# Token ids: 0 is padding, then a fact for each name and value, a question for each name, and noise.
QUESTIONS = 1 + FACTS * VALUES
VOCABULARY = QUESTIONS + FACTS + NOISE


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    distances = [16, 32, 64, 128, 256, 512]
    add("--distances", type=int, nargs="+", default=distances, help="from fact to question (default: 16 to 512)")
    add("--epochs", type=int, default=8, help="rounds of training (default: 8)")
    add("--steps", type=int, default=10, help="batches of each distance in a round (default: 10)")
    add("--dim", type=int, default=32, help="width of the Transformer, which the others are sized by (default: 32)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("why_attention_output"), help="directory, new or empty")
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.steps) < 1 or min(arguments.distances) < FACTS or arguments.dim % 4:
        parser.error(f"--epochs and --steps must be positive, --distances at least {FACTS}, --dim a multiple of 4")
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        parser.error(f"--output must be a new or empty directory; {arguments.output} is not")
    if keras.backend.backend() != "tensorflow":
        parser.error(f"gradients are taken with TensorFlow; KERAS_BACKEND is {keras.backend.backend()}")
    return arguments


def sequences(distance, count, random):
    """Tokens [count, distance + 2] and answers [count]: what is asked for stands at the given distance."""
    tokens = random.integers(QUESTIONS + FACTS, VOCABULARY, (count, distance + 2))
    values = random.integers(0, VALUES, (count, FACTS))
    for row in range(count):
        names = random.permutation(FACTS)
        places = [1, *(2 + random.choice(distance - 1, FACTS - 1, replace=False))]
        tokens[row, places] = 1 + names * VALUES + values[row, names]
        tokens[row, -1] = QUESTIONS + names[0]
    asked = tokens[:, -1] - QUESTIONS
    return tokens.astype("int32"), values[np.arange(count), asked].astype("int32")


def build_models(dim):
    """Three models with about the same number of weights; the recurrent ones have two layers, as is usual."""

    def recurrent(kind, units, name):
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        x = keras.layers.Embedding(VOCABULARY, units, name="embedding")(token_ids)
        x = kind(units, return_sequences=True)(x)
        return keras.Model(token_ids, keras.layers.Dense(VALUES)(kind(units)(x)), name=name)

    sizes = {"dim": dim, "depth": 2, "num_heads": 4, "hidden_dim": 4 * dim}
    transformer = kt.models.text_classifier(
        VOCABULARY, VALUES, **sizes, pooling="last_token", dropout=0.0, name="Transformer"
    )

    def units(gates, biases):  # Two layers, the embedding and the output.
        def weights(n):
            return 2 * gates * (2 * n * n + biases * n) + VOCABULARY * n + VALUES * (n + 1)

        return min(range(4, 4 * dim), key=lambda n: abs(weights(n) - transformer.count_params()))

    lstm = recurrent(keras.layers.LSTM, units(4, 1), "LSTM")
    return [lstm, recurrent(keras.layers.GRU, units(3, 2), "GRU"), transformer]


def compile_model(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3, global_clipnorm=1.0), loss, metrics=["accuracy"])


def train(model, arguments):
    """Accuracy at each distance after each round, which has as many batches of each distance, in random order."""
    random = np.random.default_rng(arguments.seed)
    tests = {d: sequences(d, 256, np.random.default_rng(arguments.seed + 1)) for d in arguments.distances}
    writer = tf.summary.create_file_writer(str(arguments.output / "logs" / model.name))
    rounds = []
    for epoch in range(arguments.epochs):
        bar = keras.utils.Progbar(arguments.steps * len(tests), unit_name="step")
        print(f"{model.name}, epoch {epoch + 1}/{arguments.epochs}")
        for i, distance in enumerate(random.permutation(np.repeat(arguments.distances, arguments.steps))):
            loss, accuracy = model.train_on_batch(*sequences(int(distance), 16, random))
            bar.update(i + 1, [("loss", loss), ("accuracy", accuracy)], finalize=False)
            model.reset_metrics()
        rounds.append([float(model.evaluate(*test, batch_size=64, verbose=0)[1]) for test in tests.values()])
        scores = [(f"at_{d}", x) for d, x in zip(tests, rounds[-1], strict=True)]
        bar.update(bar.target, scores, finalize=True)
        with writer.as_default(epoch):
            for name, score in scores:
                tf.summary.scalar(f"accuracy_{name}", score)
    return rounds


def gradient_at(model, distance):
    """Norm of the loss's gradient at the embedded fact that is asked for, averaged over sequences."""
    tokens, answers = sequences(distance, 16, np.random.default_rng(distance))
    table = model.get_layer("embedding").trainable_variables[0].value
    with tf.GradientTape() as tape:
        logits = model(tokens, training=False)
        loss = tf.reduce_sum(keras.losses.sparse_categorical_crossentropy(answers, logits, from_logits=True))
    slices = tape.gradient(loss, table).values  # A row for each token of each sequence.
    return float(tf.reduce_mean(tf.norm(tf.reshape(slices, (*tokens.shape, -1))[:, 1], axis=-1)))


def step_seconds(model, distance):
    """Median of five steps of training with batches of 16."""
    batch, seconds = sequences(distance, 16, np.random.default_rng(0)), []
    for _ in range(6):
        started = time.perf_counter()
        model.train_on_batch(*batch)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def draw(results, distances, path):
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {
        "accuracy": "accuracy at distance",
        "gradient_untrained": "gradient at distance, untrained",
        "step_seconds": "seconds a step (16 sequences)",
    }
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, values in results.items():
            axes.plot(distances, values[key], marker="o", label=name)
        axes.set(title=title, xlabel="tokens", xscale="log", xticks=distances, xticklabels=distances)
        if key != "accuracy":
            axes.set_yscale("log")
        axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def main():
    arguments = parse_arguments()
    kt.training.keep_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(arguments.seed)
    results, distances = {}, arguments.distances
    for model in build_models(arguments.dim):
        result = {"parameters": model.count_params()}
        result["gradient_untrained"] = [gradient_at(model, d) for d in distances]
        compile_model(model)
        result["accuracy_by_epoch"] = train(model, arguments)
        result["accuracy"] = result["accuracy_by_epoch"][-1]
        result["gradient_trained"] = [gradient_at(model, d) for d in distances]
        model.save(arguments.output / ("model.keras" if model.name == "Transformer" else f"{model.name}.keras"))
        result["step_seconds"] = [step_seconds(model, d) for d in distances]
        results[model.name] = result
    for key in ("accuracy", "gradient_untrained", "gradient_trained", "step_seconds"):
        print(f"\n{key:20}" + "".join(f"{distance:>10}" for distance in distances))
        for name, result in results.items():
            print(f"  {name:18}" + "".join(f"{value:10.3g}" for value in result[key]))
    draw(results, distances, arguments.output / "why_attention.png")
    (arguments.output / "metrics.json").write_text(json.dumps({"distances": distances, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
