"""Image captioning, end to end: from images with captions to a SavedModel that turns images into sentences.

    python examples/image_captioning.py
    python examples/image_captioning.py --data photos photos/captions.tsv --size 96 --output captions

The first line learns to read rows of two to four of scikit-learn's handwritten digits aloud: "three seven one". It is
asked about digits that it has never seen. A table of captions has a file's name, a tab and a caption in each line.
"""

import argparse
import json
import shutil
import time
from collections import namedtuple
from pathlib import Path

import keras
import numpy as np
import sacrebleu
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_transformer as kt

Recipe = namedtuple("Recipe", "convolutions dim depth num_heads hidden_dim dropout rate warmup smoothing batch epochs")
RECIPES = {
    "digits": Recipe(2, 64, (2, 2), 4, 128, 0.1, 2e-3, 200, 0.1, 64, 10),
    "photos": Recipe(3, 256, (4, 4), 4, 512, 0.2, 5e-4, 1000, 0.1, 64, 20),
}
NAMES = "zero one two three four five six seven eight nine".split()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["digits"], metavar="PATH", help="digits (default), or FOLDER and CAPTIONS.tsv")
    add("--pictures", type=int, default=15000, help="how many rows of digits to train on (default: 15000)")
    add("--recipe", choices=RECIPES, help="default: 'digits' for digits, 'photos' for a folder")
    add("--size", type=int, nargs="+", default=[96], metavar="PIXELS", help="to resize files to: edge, or height width")
    add("--vocabulary-size", type=int, default=8000, help="largest number of words (default: 8000)")
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of images, to validate on (default: 0.1)")
    add("--epochs", type=int, help="default: by --recipe")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("image_captioning_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    is_default = arguments.data == ["digits"]
    recipe = RECIPES[arguments.recipe or ("digits" if is_default else "photos")]
    recipe = recipe if arguments.epochs is None else recipe._replace(epochs=arguments.epochs)
    if not is_default and len(arguments.data) != 2:
        parser.error(f"--data must be digits, or a folder of images and a table of captions; received {arguments.data}")
    if min(recipe.epochs, arguments.pictures, *arguments.size) < 1 or len(arguments.size) > 2:
        parser.error("--epochs and --pictures must be at least 1, and --size one positive number, or height and width")
    if not 0 < arguments.held_out < 1:
        parser.error(f"--held-out must lie between 0 and 1; received {arguments.held_out}")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or hold a run that was interrupted; got {output}")
    return parser, arguments, recipe


def read_data(arguments):
    """Returns pairs of images and captions to train on and to validate on, and what could not be read."""
    if arguments.data == ["digits"]:
        digits = load_digits()
        images, random = np.round(digits.images * 255 / 16).astype("uint8"), np.random.default_rng(arguments.seed)
        parts = kt.pipelines.split_by_class(digits.target, NAMES, arguments.held_out, arguments.seed)
        counts = arguments.pictures, max(1, min(1000, arguments.pictures // 5))
        return *(
            digit_rows(images[part], digits.target[part], count, random)
            for part, count in zip(parts, counts, strict=True)
        ), []
    data = kt.pipelines.read_captioned_images(*arguments.data, (arguments.size[0], arguments.size[-1]))
    rows = range(len(data.captions))  # All captions of an image stay in one part.
    parts = kt.pipelines.split_by_group(rows, data.names, arguments.held_out, arguments.seed)
    return *((data.images[part], [data.captions[i] for i in part]) for part in parts), data.unreadable


def digit_rows(digits, labels, count, random):
    """Pictures of two to four digits in a row, each somewhat higher or lower, and how they are read."""
    pictures, texts = np.zeros((count, 12, 48, 1), "uint8"), []
    for picture in pictures:
        chosen = random.integers(len(digits), size=random.integers(2, 5))
        free = 48 - 8 * len(chosen)
        places = np.sort(random.integers(free + 1, size=len(chosen))) + 8 * np.arange(len(chosen))
        for i, left, top in zip(chosen, places, random.integers(5, size=len(chosen)), strict=True):
            picture[top : top + 8, left : left + 8, 0] = digits[i]
        texts.append(" ".join(NAMES[labels[i]] for i in chosen))
    return pictures, texts


def captioned_batches(images, captions, tokenizer, length, normalized, batch, seed=None, first_epoch=0):
    """Batches of images with the captions so far, and each caption's next token."""
    rows = [[1, *row[: length - 1], 2] for row in kt.pipelines.token_ids(tokenizer, captions)]
    ids = np.array([row + [0] * (length + 1 - len(row)) for row in rows], "int32")
    rows = kt.pipelines.epoch_rows(len(images), seed is not None, seed or 0, first_epoch)
    images, ids = tf.constant(images), tf.constant(ids)

    def inputs(places, _):
        chosen = tf.gather(ids, places)
        return {"images": normalized(tf.gather(images, places)), "target_ids": chosen[:, :-1]}, chosen[:, 1:]

    batches = rows.batch(batch, drop_remainder=seed is not None and len(images) >= batch)
    return kt.pipelines.prefetched(batches.map(inputs, num_parallel_calls=tf.data.AUTOTUNE))


def build_model(recipe, image_shape, vocabulary_size, steps):
    model = kt.models.image_captioner(image_shape, vocabulary_size, None, *recipe[:6])
    total = recipe.epochs * steps
    warmup = max(1, min(recipe.warmup, total // 5))
    options = {"warmup_target": recipe.rate, "warmup_steps": warmup}
    rate = keras.optimizers.schedules.CosineDecay(0.0, max(1, total - warmup), **options)
    loss = kt.training.SmoothedCrossEntropy(recipe.smoothing)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-2), loss, metrics=[kt.training.TokenAccuracy()])
    return model


def draw_curves(history, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "token_accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "held out")):
            axes.plot(range(1, len(history[key]) + 1), history[key], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.legend()
    figure.savefig(path)


def draw_captions(images, answers, captions, path):
    """Images with what was written under them, and in red what is wrong, with what would be right."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, image, answer, right in zip(figure.subplots(4, 3).flat, images, answers, captions, strict=False):
        axes.imshow(image, cmap="gray")
        is_right = answer == right
        axes.set_xlabel(
            answer if is_right else f"{answer}\n(right: {right})", color="black" if is_right else "red", wrap=True
        )
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    figure.savefig(path)


def main():
    parser, arguments, recipe = parse_arguments()
    kt.training.keep_memory()
    output = arguments.output
    keras.utils.set_random_seed(arguments.seed)
    try:
        (images, captions), (held_out, references), unreadable = read_data(arguments)
        tokenizer = kt.pipelines.train_words(captions, arguments.vocabulary_size, punctuation=True)
        steps, shape, size = max(1, len(images) // recipe.batch), images.shape[1:], tokenizer.vocabulary_size()
        model = build_model(recipe, shape, size, steps)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    length = 1 + max(len(row) for row in kt.pipelines.token_ids(tokenizer, captions))  # With the end.
    preprocessor = kt.pipelines.ImagePreprocessor(size=shape[:2], mean=0.5, std=0.5, channels=shape[2])
    generator = kt.generation.Generator(model, start_id=1, end_id=2)
    reader = kt.pipelines.ImageReader(preprocessor, shape)
    pipeline = kt.pipelines.Pipeline(generator, reader, tokenizer, max_new_tokens=length)

    def normalized(images):
        return tf.cast(images, "float32") / 127.5 - 1

    options = {"tokenizer": tokenizer, "length": length, "normalized": normalized, "batch": recipe.batch}
    seen = vars(arguments) | {"output": None, "images": images, "captions": captions}
    resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
    batches = captioned_batches(images, captions, **options, seed=arguments.seed, first_epoch=resume.epoch)
    validation = captioned_batches(held_out, references, **options)
    print(f"{len(images)} captions to train on, {len(held_out)} held out;")
    print(f"a vocabulary of {size}, {model.count_params()} parameters.")
    resume.directory.mkdir(parents=True, exist_ok=True)
    board, started = keras.callbacks.TensorBoard(output / "logs", write_graph=False), time.time()
    fit = {"validation_data": validation, "epochs": recipe.epochs, "callbacks": [board, resume], "shuffle": False}
    model.fit(batches, **fit)
    seconds, held_out = time.time() - started, list(held_out)
    answers = pipeline.predict(held_out)
    references = [b" ".join(tokenizer.split([text], True).to_list()[0]).decode() for text in references]
    draw_curves(resume.history, output / "curves.png")
    draw_captions(held_out, answers, references, output / "captions.png")
    model.save(output / "model.keras")
    pipeline.save(output / "pipeline")
    if keras.backend.backend() == "tensorflow":
        pipeline.export(output / "saved_model")
        describe = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        texts = describe(images=tf.constant(np.stack(held_out[:6])))["text"].numpy()
        print(f"{output / 'saved_model'} writes:")
        for text, reference in zip(texts, references, strict=False):
            print(f"  {text.decode()} (right: {reference})")
    metrics = {
        "exact_match": sum(a == b for a, b in zip(answers, references, strict=True)) / len(references),
        "bleu": sacrebleu.corpus_bleu(answers, [references], tokenize="none", force=True).score,
        "val_token_accuracy": resume.history["val_token_accuracy"],
        "parameters": model.count_params(),
        "train_seconds": seconds,
        "unreadable": unreadable,
        "recipe": {**recipe._asdict(), "data": arguments.data, "seed": arguments.seed},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(resume.directory)
    print(json.dumps(metrics, indent=2))
    if unreadable:
        print(f"{len(unreadable)} files could not be read and were left out:", *unreadable[:20], sep="\n  ")


if __name__ == "__main__":
    main()
