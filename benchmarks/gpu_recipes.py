"""The examples' recipes for large machines, on one GPU: language of nanoGPT's size, and CCT-7 on images.

    KERAS_BACKEND=jax python benchmarks/gpu_recipes.py shakespeare --data input.txt --output shakespeare.json
    KERAS_BACKEND=jax python benchmarks/gpu_recipes.py cct-7 --data cifar10.npz --epochs 300 --output cct-7.json

Model, loss, optimizer and recipe are those of `examples/`. The data lie on the GPU, where a compiled loop draws
batches, changes images with Keras' layers and trains: the processor does not hold it up, and TensorFlow need not be
there. The output has the curve; it is written after each part, so that a run that is ended has told what it did.
"""

import argparse
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import keras
import numpy as np

from keras_transformer.layers.rand_augment import rand_augment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

BYTES_BEFORE = 5  # What the byte-pair tokenizer of the example has before the single bytes: padding and others.


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["shakespeare", "cct-7"])
    add("--data", type=Path, required=True, help="text file; for cct-7, an .npz of image files")
    add("--epochs", type=int, help="of cct-7: default: by the recipe")
    add("--steps", type=int, help="of shakespeare: default: by the recipe")
    add("--part", type=int, help="steps from one validation to the next; default: 250, for cct-7 an epoch")
    add("--position", choices=["rotary", "learned", "sinusoidal"], help="of shakespeare; default: by the recipe")
    add("--dropout", type=float, help="default: by the recipe")
    add("--dtype", default="mixed_bfloat16", help="policy (default: mixed_bfloat16)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error(f"the loop is compiled by JAX: set KERAS_BACKEND=jax; the backend is {keras.backend.backend()}")
    if not arguments.data.is_file():
        parser.error(f"--data must be a file; there is none at {arguments.data}")
    return arguments


def language(arguments):
    """The model, and what draws its batches and holds its validation, as `examples/language_model.py` has them."""
    from language_model import RECIPES, build_model

    recipe = RECIPES["shakespeare-gpu"]
    recipe = recipe._replace(
        position=arguments.position or recipe.position,
        dropout=recipe.dropout if arguments.dropout is None else arguments.dropout,
        steps=arguments.steps or recipe.steps,
    )
    text = arguments.data.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    train, held_out = (
        np.frombuffer(part.encode(), "uint8").astype("int32") + BYTES_BEFORE for part in (text[:cut], text[cut:])
    )
    model, length = build_model(recipe, recipe.vocabulary, recipe.steps), recipe.length
    ids = keras.ops.convert_to_tensor(train)

    def draw(key, number, seeds):
        starts = jax.random.randint(key, (recipe.batch, 1), 0, len(train) - length)
        windows = ids[starts + np.arange(length + 1)]
        return (windows[:, :-1], windows[:, 1:]), seeds

    starts = np.arange(0, len(held_out) - length, length)
    windows = held_out[starts[:, None] + np.arange(length + 1)]
    validation = [(part[:, :-1], part[:, 1:]) for part in np.array_split(windows, -(-len(windows) // 64))]
    return model, draw, [], validation, arguments.part or 250, recipe.steps, recipe


def images(arguments):
    """The same of `examples/image_classification.py` and `kt.pipelines.image_batches`."""
    from image_classification import RECIPES, build_model
    from PIL import Image

    with np.load(arguments.data) as file:
        data, offsets, labels, classes = (file[key] for key in ("data", "offsets", "labels", "classes"))
    files = (data[begin:end].tobytes() for begin, end in zip(offsets[:-1], offsets[1:], strict=True))
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    held_out = np.random.default_rng(arguments.seed).permutation(len(pictures)) < len(pictures) // 10
    mean = pictures[~held_out].mean((0, 1, 2), dtype="float64").astype("float32")
    std = np.sqrt((pictures[~held_out].astype("float32") - mean).var((0, 1, 2), dtype="float64")).astype("float32")
    targets = np.eye(len(classes), dtype="float32")[labels]

    recipe = RECIPES["cct-7"]
    recipe = recipe if arguments.epochs is None else recipe._replace(epochs=arguments.epochs)
    if arguments.dropout is not None:
        recipe = recipe._replace(model=recipe.model | {"dropout": arguments.dropout})
    steps = int((~held_out).sum()) // recipe.batch
    model = build_model(recipe, pictures.shape[1:], len(classes), steps)
    change, crop, seed = recipe.changes, recipe.changes["crop"], arguments.seed
    layers = [keras.layers.RandomFlip("horizontal", seed=seed)]
    layers.append(rand_augment(change["rand_augment"], seed=seed + 1))
    mixes = [keras.layers.MixUp(change["mix_up"], seed=seed + 2), keras.layers.CutMix(change["cut_mix"], seed=seed + 3)]
    around = ((0, 0), (crop, crop), (crop, crop), (0, 0))
    padded = keras.ops.convert_to_tensor(np.pad(pictures[~held_out], around))
    given = keras.ops.convert_to_tensor(targets[~held_out])
    for layer in layers:
        layer(pictures[:2].astype("float32"), training=True)  # Which gives it a seed.
    for layer in mixes:
        layer({"images": pictures[:2].astype("float32"), "labels": targets[:2]}, training=True)
    seeds = [[variable.value for variable in layer.non_trainable_variables] for layer in (*layers, *mixes)]

    def draw(key, number, seeds):
        # Without repetition within an epoch: each has an order of its own.
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), number // steps), len(padded))
        chosen = jax.lax.dynamic_slice(order, (number % steps * recipe.batch,), (recipe.batch,))
        corners = jax.random.randint(key, (recipe.batch, 2), 0, 2 * crop + 1)
        cut = jax.vmap(lambda i, at: jax.lax.dynamic_slice(padded[i], (*at, 0), pictures.shape[1:]))
        x, y, seeds = cut(chosen, corners).astype("float32"), given[chosen], list(seeds)
        for i, layer in enumerate(layers):
            x, seeds[i] = layer.stateless_call([], seeds[i], x, training=True)
        mixed = []
        for i, layer in enumerate(mixes, start=len(layers)):
            pair, seeds[i] = layer.stateless_call([], seeds[i], {"images": x, "labels": y}, training=True)
            mixed.append(pair)
        x, y = (jax.numpy.where(number % 2 == 0, mixed[0][name], mixed[1][name]) for name in ("images", "labels"))
        return ((x - mean) / std, y), seeds

    kept = (pictures[held_out].astype("float32") - mean) / std, targets[held_out]
    parts = -(-len(kept[0]) // 500)
    validation = list(zip(*(np.array_split(x, parts) for x in kept), strict=True))
    return model, draw, seeds, validation, arguments.part or steps, recipe.epochs * steps, recipe


def train(model, draw, seeds, validation, size, steps, write):
    """Trains in parts of `size` steps: one program draws their batches, another learns from them, a third validates."""

    def draw_part(seeds, key, begin):
        def one(seeds, number):
            batch, seeds = draw(jax.random.fold_in(key, number), number, seeds)
            return seeds, batch

        return jax.lax.scan(one, seeds, begin + jax.numpy.arange(size))

    def train_part(state, batches):
        def one(state, batch):
            logs, state = model.train_step(state, batch)
            return state, logs["loss"]

        state, losses = jax.lax.scan(one, state, batches)
        return state, losses[-1]

    model._symbolic_build(data_batch=validation[0])
    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = model._get_jax_state(**dict.fromkeys(kinds, True))
    empty = [np.zeros(variable.shape, variable.dtype) for variable in model.metrics_variables]
    key, test = jax.random.key(0), jax.jit(model.test_step)
    batches = jax.eval_shape(draw_part, seeds, key, 0)[1]
    lowered = jax.jit(draw_part).lower(seeds, key, 0), jax.jit(train_part, donate_argnums=0).lower(state, batches)
    with ThreadPoolExecutor() as pool:  # Each compiles for a minute.
        draw_part, train_part = pool.map(lambda program: program.compile(), lowered)
    print("compiled", flush=True)
    began, curve = time.time(), []
    for begin in range(0, steps, size):
        state = (*state[:3], [jax.numpy.array(x) for x in empty])  # Metrics begin anew.
        seeds, batches = draw_part(seeds, key, begin)
        state, loss = train_part(state, batches)
        measured = (state[0], state[1], [jax.numpy.array(x) for x in empty])
        for batch in validation:
            logs, measured = test(measured, batch)
        metrics = {name: round(float(value), 5) for name, value in logs.items()}
        curve.append({"step": begin + size, "train_loss": round(float(loss), 5), **metrics})
        curve[-1]["seconds"] = round(time.time() - began, 1)
        print(curve[-1], flush=True)
        write(curve)


def main():
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    keras.config.set_dtype_policy(arguments.dtype)
    model, draw, seeds, validation, size, steps, recipe = (language if arguments.task == "shakespeare" else images)(
        arguments
    )
    device = jax.devices()[0].device_kind
    print(f"{arguments.task} on {device}: {model.count_params()} parameters, {steps} steps", flush=True)
    told = {"task": arguments.task, "device": device, "dtype": arguments.dtype, "parameters": model.count_params()}
    told |= {"steps": steps, "seed": arguments.seed, "recipe": recipe._asdict()}
    train(
        model,
        draw,
        seeds,
        validation,
        size,
        steps,
        lambda curve: arguments.output.write_text(json.dumps({**told, "curve": curve}, indent=1) + "\n"),
    )


if __name__ == "__main__":
    main()
