"""Image classification, end to end: from images by class to a SavedModel that turns images into labels.

    python examples/image_classification.py
    python examples/image_classification.py --data cifar10.npz --recipe keras-io-cct --output cifar
    python examples/image_classification.py --data photos --size 64

The first line learns to read scikit-learn's handwritten digits. A folder has one folder of images for each class; an
.npz file is as `kt.pipelines.read_image_archive` says; `--data keras-cifar10` downloads the images of that name.
On processors without AVX-512, `TF_ENABLE_ONEDNN_OPTS=1` makes TensorFlow's convolutions faster.
"""

import argparse
import json
import shutil
import time
from collections import namedtuple
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay

import keras_transformer as kt

# `keras-io-cct` is the model of https://keras.io/examples/vision/cct/ with its optimizer, whose rate falls by a cosine
# here; `cct-7` is CCT-7/3x1 of Hassani et al. (2021). `warmup` counts epochs.
Recipe = namedtuple("Recipe", "model changes batch epochs rate final_rate warmup decay smoothing")
COMPACT = {"pooling": "sequence", "drop_path": 0.1}
SMALL = {"convolutions": 1, "dim": 64, "depth": 2, "num_heads": 4, "hidden_dim": 128, "dropout": 0.0}
VIT = {"patch_size": 4, "dim": 128, "depth": 6, "num_heads": 4, "hidden_dim": 256}
CCT = {"convolutions": 2, "dim": 128, "depth": 2, "num_heads": 2, "hidden_dim": 128, "head_dim": 128}
CCT_7 = {"convolutions": 1, "dim": 256, "depth": 7, "num_heads": 4, "hidden_dim": 512}
MOVED = {"crop": 4, "flip": True}
MIXED = {"rand_augment": 0.3, "mix_up": 0.8, "cut_mix": 1.0}
RECIPES = {
    "digits": Recipe(SMALL | COMPACT, {"crop": 1}, 32, 25, 2e-3, 0.0, 2, 1e-2, 0.1),
    "vit": Recipe(VIT, MOVED, 128, 100, 1e-3, 0.0, 5, 1e-2, 0.1),
    "keras-io-cct": Recipe(CCT | COMPACT, MOVED, 128, 30, 1e-3, 0.0, 1, 1e-4, 0.1),
    "cct-7": Recipe(CCT_7 | COMPACT, MOVED | MIXED, 128, 300, 5.5e-4, 1e-5, 10, 6e-2, 0.1),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits (default), keras-cifar10, an .npz file, or a folder of folders")
    add("--recipe", choices=RECIPES, help="default: 'digits' for digits, 'keras-io-cct' for others")
    add("--size", type=int, nargs="+", default=[32], metavar="PIXELS", help="to resize files to: edge, or height width")
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of each class, to validate on (default: 0.1)")
    add("--epochs", type=int, help="default: by --recipe")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("image_classification_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ("digits" if arguments.data == "digits" else "keras-io-cct")
    recipe = RECIPES[arguments.recipe]
    recipe = recipe if arguments.epochs is None else recipe._replace(epochs=arguments.epochs)
    if recipe.epochs < 1 or not 0 < arguments.held_out < 1:
        received = f"received {recipe.epochs} and {arguments.held_out}"
        parser.error(f"--epochs must be at least 1 and --held-out lie between 0 and 1; {received}")
    if len(arguments.size) > 2 or min(arguments.size) < 1:
        parser.error(f"--size must be one positive number, or height and width; received {arguments.size}")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or hold a run that was interrupted; got {output}")
    return parser, arguments, recipe


def read_data(arguments):
    """Returns images, labels, names of classes and what could not be read; and the places to train and validate on."""
    data = read_images(arguments.data, (arguments.size[0], arguments.size[-1]))
    if arguments.data == "keras-cifar10":  # Its test images come behind the others.
        return data, np.arange(50000), np.arange(50000, 60000)
    return data, *kt.pipelines.split_by_class(data.labels, data.classes, arguments.held_out, arguments.seed)


def read_images(data, size):
    if data == "digits":
        digits = load_digits()
        images = np.round(digits.images[..., None] * 255 / 16).astype("uint8")
        return kt.pipelines.LabelledImages(images, digits.target, [str(name) for name in digits.target_names], [])
    if data == "keras-cifar10":
        try:
            images, labels = map(np.concatenate, zip(*keras.datasets.cifar10.load_data(), strict=True))
        except Exception as error:  # This is what Keras raises without a network.
            raise OSError(f"--data keras-cifar10 must be downloaded: {error}") from error
        names = "airplane automobile bird cat deer dog frog horse ship truck".split()
        return kt.pipelines.LabelledImages(images, labels[:, 0], names, [])
    if Path(data).is_dir():
        return kt.pipelines.read_image_folder(data, size)
    if data.endswith(".npz"):
        return kt.pipelines.read_image_archive(data, size)
    raise ValueError(f"--data must be digits, keras-cifar10, an .npz file or a folder of folders; received {data}")


def build_model(recipe, image_shape, num_classes, steps):
    model = kt.models.vision_transformer(image_shape, num_classes, **recipe.model)
    total = recipe.epochs * steps
    warmup = max(1, min(recipe.warmup * steps, total // 5))
    options = {"warmup_target": recipe.rate, "warmup_steps": warmup, "alpha": recipe.final_rate / recipe.rate}
    schedule = keras.optimizers.schedules.CosineDecay(0.0, max(1, total - warmup), **options)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.smoothing)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=recipe.decay), loss, metrics=["accuracy"])
    return model


def draw_curves(history, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training, on changed images"), (f"val_{name}", "held out")):
            axes.plot(range(1, len(history[key]) + 1), history[key], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.legend()
    figure.savefig(path)


def draw_confusion(truth, answers, classes, path):
    figure = Figure(figsize=(2.5 + 0.6 * len(classes),) * 2, layout="constrained")
    axes = figure.subplots()
    options = {"labels": classes, "cmap": "Blues", "colorbar": False, "xticks_rotation": "vertical"}
    ConfusionMatrixDisplay.from_predictions(truth, answers, ax=axes, **options)
    axes.set_title(f"{len(truth)} held-out images")
    figure.savefig(path)


def draw_samples(images, truth, answers, path):
    """Images with their answers; below what is wrong stands what is right."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, image, right, answer in zip(figure.subplots(4, 8).flat, images, truth, answers, strict=False):
        axes.imshow(image, cmap="gray")
        axes.set_title(answer, color="black" if answer == right else "red")
        axes.set_xlabel("" if answer == right else f"right: {right}")
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path)


def main():
    parser, arguments, recipe = parse_arguments()
    kt.training.keep_memory()
    output = arguments.output
    keras.utils.set_random_seed(arguments.seed)
    try:
        data, train, held_out = read_data(arguments)
        steps, shape = max(1, len(train) // recipe.batch), data.images.shape[1:]
        model = build_model(recipe, shape, len(data.classes), steps)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    statistics = data.images[train] / np.float32(255)
    mean, std = statistics.mean((0, 1, 2)), statistics.std((0, 1, 2)) + 1e-6
    numbers = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    preprocessor = kt.pipelines.ImagePreprocessor(size=shape[:2], channels=shape[2], **numbers)
    classifier = kt.pipelines.Classifier(model, kt.pipelines.ImageReader(preprocessor, shape), data.classes)

    seen = vars(arguments) | {"output": None, "images": data.images, "labels": data.labels}
    resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
    options = {"num_classes": len(data.classes), "preprocessor": preprocessor, "seed": arguments.seed}
    changes = {**recipe.changes, "first_epoch": resume.epoch}
    parts = [(data.images[part], data.labels[part]) for part in (train, held_out)]
    batches = kt.pipelines.image_batches(*parts[0], **options, **changes, batch_size=recipe.batch)
    validation = kt.pipelines.image_batches(*parts[1], **options, shuffle=False, batch_size=256).cache()
    print(f"{len(train)} images of {len(data.classes)} classes to train on, {len(held_out)} held out;")
    print(f"{model.count_params()} parameters.")
    resume.directory.mkdir(parents=True, exist_ok=True)
    board, started = keras.callbacks.TensorBoard(output / "logs", write_graph=False), time.time()
    fit = {"validation_data": validation, "epochs": recipe.epochs, "callbacks": [board, resume], "shuffle": False}
    model.fit(batches, **fit)
    seconds = time.time() - started
    images, truth = list(data.images[held_out]), [data.classes[label] for label in data.labels[held_out]]
    answers = classifier.predict(images)
    draw_curves(resume.history, output / "curves.png")
    draw_confusion(truth, answers, data.classes, output / "confusion.png")
    chosen = np.random.default_rng(arguments.seed).permutation(len(images))[:32]
    draw_samples(*([column[i] for i in chosen] for column in (images, truth, answers)), output / "samples.png")
    model.save(output / "model.keras")
    classifier.save(output / "classifier")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        classifier.export(output / "saved_model")
        classify = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        served = classify(images=tf.constant(np.stack([images[i] for i in chosen[:8]])))["label"].numpy()
        print(f"{output / 'saved_model'} answers:")
        for answer, i in zip(served, chosen, strict=False):
            print(f"  {answer.decode()} (right: {truth[i]})")
    metrics = {
        "accuracy": sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth),
        "val_accuracy": resume.history["val_accuracy"],
        "parameters": model.count_params(),
        "train_seconds": seconds,
        "unreadable": data.unreadable,
        "recipe": {**recipe._asdict(), "data": arguments.data, "seed": arguments.seed},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(resume.directory)
    print(json.dumps(metrics, indent=2))
    if data.unreadable:
        print(f"{len(data.unreadable)} files could not be read and were left out:", *data.unreadable[:20], sep="\n  ")


if __name__ == "__main__":
    main()
