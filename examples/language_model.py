"""A language model, end to end: from files of text or source code to a SavedModel that goes on with any beginning.

    python examples/language_model.py
    python examples/language_model.py --fill-in-the-middle --output filling
    python examples/language_model.py --data shakespeare.txt --recipe shakespeare-cpu --output shakespeare

The first line learns to write Python from the standard library beside the interpreter, and completes code. The second
one also learns to fill a hole from the code around it. The recipes of Shakespeare are those of nanoGPT.
"""

import argparse
import json
import random
import shutil
import sysconfig
import time
from collections import namedtuple
from pathlib import Path

import keras
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import keras_transformer as kt

Recipe = namedtuple("Recipe", "dim depth num_heads length batch steps dropout peak lowest warmup vocabulary position")
RECIPES = {
    "code": Recipe(128, 4, 4, 128, 16, 600, 0.0, 3e-3, 3e-4, 60, 1024, "rotary"),
    "shakespeare-cpu": Recipe(128, 4, 4, 64, 12, 2000, 0.0, 1e-3, 1e-4, 100, 261, "learned"),
    "shakespeare-gpu": Recipe(384, 6, 6, 256, 64, 5000, 0.2, 1e-3, 1e-4, 100, 261, "learned"),
}
BEGINNINGS = {"code": ["def __init__(self, ", "import os\nimport ", "    for i in ", "class Error("]}
HOLES = [("def first(items):\n", "\n    return item\n"), ("with open(path) as ", ":\n    data = file.read()\n")]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="text file, or folder of them; default: Python's standard library")
    add("--suffix", default=".txt", help="of the files in a folder, such as .py (default: .txt)")
    add("--recipe", choices=RECIPES, default="code", help="default: code")
    add("--fill-in-the-middle", action="store_true", help="show half of the windows with their middle at the end")
    add("--epochs", type=int, default=5, help="parts that the steps of the recipe are done in (default: 5)")
    add("--steps", type=int, help="how many batches to train on; default: as the recipe says")
    add("--position", choices=["rotary", "learned", "sinusoidal"], help="default: as the recipe says")
    add("--prompt", action="append", help="a beginning to go on with; may be given several times")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("language_model_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.steps is not None and arguments.steps < arguments.epochs:
        parser.error("--epochs must be at least 1, and --steps at least as many")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or empty directory, or hold a run that was interrupted; got {output}")
    if "" in (arguments.prompt or ()):
        parser.error("--prompt must hold a character to go on from")
    return parser, arguments


def read_data(arguments):
    """Texts to train on and to validate on: a tenth is held out, of one text its end."""
    if arguments.data is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
            Path(json.__file__).parent.glob("*.py")
        )
        texts = [path.read_text(encoding="utf-8") for path in files]
    else:
        texts = kt.pipelines.read_texts(arguments.data, arguments.suffix)
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        return [texts[0][:cut]], [texts[0][cut:]]
    random.Random(arguments.seed).shuffle(texts)
    held_out = max(1, len(texts) // 10)
    return texts[held_out:], texts[:held_out]


def build_model(recipe, vocabulary_size, steps):
    limit = recipe.length if recipe.position == "learned" else None
    model = kt.models.causal_lm(
        vocabulary_size, *recipe[:3], max_length=limit, position=recipe.position, dropout=recipe.dropout
    )
    # From 0 up to the peak, then along a cosine down to the lowest rate.
    warmup = min(recipe.warmup, steps // 2)
    options = {"alpha": recipe.lowest / recipe.peak, "warmup_target": recipe.peak, "warmup_steps": warmup}
    rate = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warmup), **options)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1, beta_2=0.99, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "norm", "embedding", "position"])
    model.compile(optimizer, kt.training.SmoothedCrossEntropy(0.0), metrics=[kt.training.TokenAccuracy()])
    return model


def surprise(model, ids):
    """The loss of each token but the first, in nats."""
    logits = keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(ids[None, :-1]), training=False))[0]
    return -keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def draw_surprise(model, tokenizer, ids, path):
    """A piece of text in which each token is the redder the less the model expected it."""
    figure, (row, column) = Figure(figsize=(10, 5)), (0, 0)
    for token, loss in zip(ids[1:].tolist(), surprise(model, ids), strict=True):
        color = colormaps["Reds"](min(loss / 8, 1) * 0.6)
        for part in tokenizer.decode([token]).expandtabs(4).replace("\r", "").splitlines(keepends=True):
            box = {"facecolor": color, "edgecolor": "none", "pad": 1}
            if part.rstrip("\n"):
                place = (0.02 + column * 0.0098, 0.93 - row * 0.042)
                figure.text(*place, part.rstrip("\n"), family="monospace", size=9, bbox=box, va="top")
            column += len(part)
            if part.endswith("\n") or column > 92:
                row, column = row + 1, 0
    figure.suptitle("How unexpected each token was", size=10, y=0.99)
    figure.savefig(path, dpi=120)


def draw_curves(history, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "val_loss"):
        axes.plot(range(1, len(history[name]) + 1), history[name], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="nats a token")
    axes.legend()
    figure.savefig(path)


def main():
    parser, arguments = parse_arguments()
    kt.training.keep_memory()
    recipe, output = RECIPES[arguments.recipe], arguments.output
    recipe = recipe._replace(position=arguments.position or recipe.position, steps=arguments.steps or recipe.steps)
    middle_rate = 0.5 if arguments.fill_in_the_middle else 0.0
    try:
        texts, held_out = read_data(arguments)
        tokenizer = kt.pipelines.train_byte_pairs(texts, recipe.vocabulary)
        ids, held_out_ids = (kt.pipelines.token_stream(tokenizer, part) for part in (texts, held_out))
        size, steps = (recipe.length, recipe.batch), -(-recipe.steps // arguments.epochs)
        seen = vars(arguments) | {"output": None, "ids": ids}
        resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
        options = {"middle_rate": middle_rate, "first_batch": resume.epoch * steps}
        batches = kt.pipelines.token_windows(ids, *size, seed=arguments.seed, **options)
        validation = kt.pipelines.token_windows(held_out_ids, *size, shuffle=False).cache()
    except (ValueError, OSError) as error:
        parser.error(f"--data: {error}")
    resume.directory.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(arguments.seed)
    model = build_model(recipe, tokenizer.get_vocab_size(), steps * arguments.epochs)
    print(f"{len(ids)} tokens to train on, {len(held_out_ids)} to validate on, {model.count_params()} parameters.")
    started = time.time()
    model.fit(
        batches,
        validation_data=validation,
        epochs=arguments.epochs,
        steps_per_epoch=steps,
        callbacks=[keras.callbacks.TensorBoard(output / "logs", write_graph=False), resume],
    )
    train_seconds, history = time.time() - started, resume.history
    bytes_per_token = sum(len(text.encode()) for text in held_out) / len(held_out_ids)
    metrics = {
        "val_loss": history["val_loss"][-1],
        "val_token_accuracy": history["val_token_accuracy"][-1],
        "bits_per_byte": history["val_loss"][-1] / np.log(2) / bytes_per_token,
        "parameters": model.count_params(),
        "steps": steps * arguments.epochs,
        "train_seconds": train_seconds,
    }
    draw_curves(history, output / "curves.png")
    draw_surprise(model, tokenizer, held_out_ids[: recipe.length], output / "surprise.png")
    model.save(output / "model.keras")
    sampler = kt.generation.Sampling(temperature=0.7, top_k=50, seed=arguments.seed)
    generator = kt.generation.Generator(model, end_id=kt.pipelines.language_data.END_OF_TEXT_ID, sampler=sampler)
    answer = kt.pipelines.GeneratedText(generator, tokenizer, max_new_tokens=min(48, recipe.length // 2))
    pipeline = kt.pipelines.PretrainedPipeline(kt.pipelines.TextReader(tokenizer, "token_ids"), answer)
    prompts = arguments.prompt or BEGINNINGS.get(arguments.recipe, ["ROMEO:\n", "What is "])
    if arguments.fill_in_the_middle:
        words = kt.pipelines.language_data
        holes = (f"{words.PREFIX}{before}{words.SUFFIX}{behind}{words.MIDDLE}" for before, behind in HOLES)
        prompts = [*prompts, *holes]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        pipeline.export(output / "saved_model")
        complete = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        answers = [text.decode(errors="replace") for text in complete(text=tf.constant(prompts))["text"].numpy()]
    else:
        answers = pipeline.predict(prompts)
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"--- {prompt}\n>>> {text}\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(resume.directory)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
