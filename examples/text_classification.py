"""Text classification, end to end: from labelled texts to a SavedModel that turns strings into labels.

    python examples/text_classification.py
    python examples/text_classification.py --data imdb.jsonl.gz --recipe keras-io --output imdb
    python examples/text_classification.py --data reviews.tsv --epochs 5

The first line learns from the names of emoji which of eight languages a name is in, and is asked about emoji that it
has never seen. Files are .jsonl, .csv or .tsv with `label` and `text`, also as .gz; `--data keras-imdb` downloads the
reviews that come with Keras.
"""

import argparse
import itertools
import json
import shutil
import time
from collections import Counter, namedtuple
from pathlib import Path

import keras
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

import keras_transformer as kt

# `keras-io` is the recipe of https://keras.io/examples/nlp/text_classification_with_transformer/, at a constant rate.
FIELDS = "dim depth num_heads hidden_dim dropout tokens vocabulary length token_dropout smoothing rate batch epochs"
Recipe = namedtuple("Recipe", FIELDS)
RECIPES = {
    "emoji": Recipe(64, 2, 4, 256, 0.1, "pieces", 2000, 64, 0.0, 0.0, 2e-3, 64, 12),
    "keras-io": Recipe(32, 1, 2, 32, 0.1, "words", 20000, 200, 0.0, 0.0, 1e-3, 32, 2),
    "best": Recipe(64, 1, 2, 128, 0.3, "words and marks", 30000, 400, 0.3, 0.1, 1e-3, 32, 4),
}
UNKNOWN_ID = 3


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="emoji", help="emoji (default), keras-imdb, or a file of labels and texts")
    add("--recipe", choices=RECIPES, help="default: 'emoji' for names of emoji, 'best' for others")
    add("--held-out", type=float, default=0.2, metavar="SHARE", help="of the texts, to validate on (default: 0.2)")
    add("--vocabulary-size", type=int, help="default: by --recipe")
    add("--epochs", type=int, help="default: by --recipe")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("text_classification_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ("emoji" if arguments.data == "emoji" else "best")
    changes = {"vocabulary": arguments.vocabulary_size, "epochs": arguments.epochs}
    recipe = RECIPES[arguments.recipe]._replace(**{name: n for name, n in changes.items() if n is not None})
    if recipe.epochs < 1 or not 0 < arguments.held_out < 1:
        received = f"received {recipe.epochs} and {arguments.held_out}"
        parser.error(f"--epochs must be at least 1 and --held-out lie between 0 and 1; {received}")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or hold a run that was interrupted; got {output}")
    return parser, arguments, recipe


def read_data(arguments):
    """Returns pairs of text and label to train on, and held-out ones."""
    if arguments.data == "keras-imdb":
        return read_keras_imdb()
    if arguments.data == "emoji":
        names = kt.pipelines.emoji_names()
        pairs, groups = [(name, language) for name, language, _ in names], [emoji for *_, emoji in names]
    else:
        groups, labels = kt.pipelines.read_labelled_texts(arguments.data)  # A text that repeats stays in one part.
        pairs = list(zip(groups, labels, strict=True))
    counts = Counter(label for _, label in pairs)
    rarest = min(counts, key=counts.get)
    if len(counts) < 2 or counts[rarest] < 2:
        raise ValueError(
            f"--data must have two classes or more, of two texts or more; received {len(counts)} classes, of which "
            f"{rarest!r} has {counts[rarest]}. If the first row names the columns, they must be label and text"
        )
    return kt.pipelines.split_by_group(pairs, groups, arguments.held_out, arguments.seed)


def read_keras_imdb():
    """The reviews that Keras downloads, which come as numbers of words: the training part and the test part."""
    try:
        parts = keras.datasets.imdb.load_data()
        words = {number + 3: word for word, number in keras.datasets.imdb.get_word_index().items()}
    except Exception as error:  # This is what Keras raises without a network.
        raise OSError(f"--data keras-imdb must be downloaded: {error}") from error

    def text(row):
        return " ".join(words.get(i, "") for i in row)

    return [[(text(row), ("negative", "positive")[label]) for row, label in zip(*part, strict=True)] for part in parts]


def make_reader(recipe, texts):
    """Trains a tokenizer; of a long text the last tokens are read, as Keras' example does it."""
    if recipe.tokens == "pieces":
        tokenizer = kt.pipelines.train_word_piece(texts, recipe.vocabulary)
    else:
        tokenizer = kt.pipelines.train_words(texts, recipe.vocabulary, punctuation=recipe.tokens == "words and marks")
    return kt.pipelines.TokenReader(tokenizer, max_length=recipe.length, keep="last")


def build_model(recipe, vocabulary_size, classes, steps, constant_rate):
    model = kt.models.text_classifier(vocabulary_size, classes, *recipe[:4], dropout=recipe.dropout)
    warmup = max(1, steps // 20)
    decay = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=recipe.rate, warmup_steps=warmup
    )
    model.compile(
        keras.optimizers.Adam(recipe.rate if constant_rate else decay),
        kt.training.SmoothedCrossEntropy(recipe.smoothing, pad_id=None),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    return model


def drop_tokens(batches, share, first_epoch):
    """Makes a share of the tokens unknown, others in each epoch, so that no single word can be relied on."""
    epochs = itertools.count(first_epoch)

    def drop(epoch, number, row):
        is_dropped = (tf.random.stateless_uniform(tf.shape(row[0]), (epoch, number)) < share) & (row[0] != 0)
        return tf.where(is_dropped, UNKNOWN_ID, row[0]), *row[1:]

    epoch = tf.data.Dataset.from_generator(lambda: [next(epochs)], output_signature=tf.TensorSpec((), "int64"))
    numbered = epoch.flat_map(lambda n: batches.enumerate().map(lambda number, row: (n, number, row)))
    changed = numbered.map(drop, num_parallel_calls=tf.data.AUTOTUNE)
    return kt.pipelines.prefetched(changed, int(batches.cardinality()))


def draw_curves(history, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "held out")):
            axes.plot(range(1, len(history[key]) + 1), history[key], marker="o", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.legend()
    figure.savefig(path)


def draw_confusion(truth, answers, labels, path):
    figure = Figure(figsize=(2.5 + 0.6 * len(labels),) * 2, layout="constrained")
    axes = figure.subplots()
    options = {"labels": labels, "cmap": "Blues", "colorbar": False, "xticks_rotation": "vertical"}
    ConfusionMatrixDisplay.from_predictions(truth, answers, ax=axes, **options)
    axes.set_title(f"{len(truth)} held-out texts")
    figure.savefig(path)


def main():
    parser, arguments, recipe = parse_arguments()
    kt.training.keep_memory()
    output = arguments.output
    keras.utils.set_random_seed(arguments.seed)
    try:
        train, held_out = read_data(arguments)
        labels = sorted({label for _, label in train + held_out})
        reader = make_reader(recipe, [text for text, _ in train])
        rows = [reader.rows([text for text, _ in part]) for part in (train, held_out)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    numbers = [[labels.index(label) for _, label in part] for part in (train, held_out)]
    seen = vars(arguments) | {"output": None, "texts": train + held_out}
    resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
    options = {"seed": arguments.seed, "first_epoch": resume.epoch}
    batches = kt.pipelines.text_batches(rows[0], numbers[0], recipe.batch, **options)
    validation = kt.pipelines.text_batches(rows[1], numbers[1], recipe.batch, shuffle=False)
    size, steps = reader.tokenizer.vocabulary_size(), recipe.epochs * int(batches.cardinality())
    model = build_model(recipe, size, len(labels), steps, constant_rate=arguments.recipe == "keras-io")
    print(f"{len(train)} texts of {len(labels)} classes to train on, {len(held_out)} held out;")
    print(f"a vocabulary of {size}, {model.count_params()} parameters.")
    if recipe.token_dropout:
        batches = drop_tokens(batches, recipe.token_dropout, resume.epoch)
    resume.directory.mkdir(parents=True, exist_ok=True)
    board, started = keras.callbacks.TensorBoard(output / "logs", write_graph=False), time.time()
    fit = {"validation_data": validation, "epochs": recipe.epochs, "callbacks": [board, resume], "shuffle": False}
    model.fit(batches, **fit)
    seconds = time.time() - started
    classifier = kt.pipelines.Classifier(model, reader, labels)
    texts, truth = zip(*held_out, strict=True)
    answers = classifier.predict(texts)
    draw_curves(resume.history, output / "curves.png")
    draw_confusion(truth, answers, labels, output / "confusion.png")
    model.save(output / "model.keras")
    classifier.save(output / "classifier")
    if keras.backend.backend() == "tensorflow":
        classifier.export(output / "saved_model")
        classify = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        served = classify(text=tf.constant(texts[:8]))["label"].numpy()
        print(f"{output / 'saved_model'} answers:")
        for text, answer, right in zip(texts, served, truth, strict=False):
            print(f"  {answer.decode()} (right: {right})  {text if len(text) < 80 else '...' + text[-80:]}")
    metrics = {
        "accuracy": sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth),
        "val_accuracy": resume.history["val_accuracy"],
        "parameters": model.count_params(),
        "train_seconds": seconds,
        "recipe": {**recipe._asdict(), "data": arguments.data, "seed": arguments.seed},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(resume.directory)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
