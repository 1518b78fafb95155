"""This library's side of `gpu.py`: each case as functions that run a block and return the seconds of a unit of it."""

import time

import keras
import numpy as np
from gpu import STEPS

import keras_transformer as kt

BACKEND = keras.backend.backend()


def matmul(s, backend):
    """A product of two matrices of random numbers."""
    random = keras.random.normal((s["size"], s["size"]), dtype="bfloat16", seed=0)
    if BACKEND == "jax":
        import jax

        product = jax.jit(lambda x: x @ x)
        finish = jax.block_until_ready
    else:
        product, finish = (lambda x: x @ x), synchronize

    def block():
        result = finish(product(random))
        started = time.perf_counter()
        for _ in range(STEPS):
            result = product(random)
        finish(result)
        return (time.perf_counter() - started) / STEPS

    return {"": block}


def gpt2(s, backend):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = language_model(s, mask_zero=not s["packed"])
    tokens = np.random.default_rng(0).integers(1, s["vocabulary"], (s["batch"], s["length"] + 1)).astype("int32")
    return training(model, kt.training.SmoothedCrossEntropy(0.0), tokens[:, :-1], tokens[:, 1:], backend)


def vit(s, backend):
    keras.config.set_dtype_policy("mixed_bfloat16")
    shape = (s["image"], s["image"], 3)
    model = kt.models.vision_transformer(
        shape, s["classes"], s["patch"], dim=s["dim"], depth=s["depth"], num_heads=s["heads"],
        hidden_dim=4 * s["dim"], dropout=0.0,
    )  # fmt: skip
    random = np.random.default_rng(0)
    images = random.standard_normal((s["batch"], *shape), dtype="float32")
    labels = random.integers(0, s["classes"], s["batch"]).astype("int32")
    return training(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), images, labels, backend)


def translation(s, backend):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = kt.models.transformer(
        s["vocabulary"], s["vocabulary"], dim=s["dim"], depth=s["depth"], num_heads=s["heads"],
        hidden_dim=s["hidden"], dropout=0.0,
    )  # fmt: skip
    random = np.random.default_rng(0)
    source = random.integers(1, s["vocabulary"], (s["batch"], s["length"])).astype("int32")
    target = random.integers(1, s["vocabulary"], (s["batch"], s["length"] + 1)).astype("int32")
    x = {"source_ids": source, "target_ids": target[:, :-1]}
    return training(model, kt.training.SmoothedCrossEntropy(0.0), x, target[:, 1:], backend)


def generate(s, backend):
    """Greedy decoding of a fixed number of tokens: nothing ends a sequence."""
    keras.config.set_dtype_policy("bfloat16")
    generator = kt.generation.Generator(language_model(s))
    random = np.random.default_rng(0)

    def way(batch):
        prompt = random.integers(1, s["vocabulary"], (batch, s["prompt"])).astype("int32")

        def block():
            started = time.perf_counter()
            generator.generate(prompt, s["tokens"])  # The result is an array in main memory: all has been computed.
            return time.perf_counter() - started

        return block

    return {f" batch {batch}": way(batch) for batch in s["batches"]}


def language_model(s, mask_zero=True):
    return kt.models.causal_lm(
        s["vocabulary"], dim=s["dim"], depth=s["depth"], num_heads=s["heads"], max_length=s["length"],
        position="learned", activation=kt.layers.gelu_tanh, dropout=0.0, mask_zero=mask_zero,
    )  # fmt: skip


def training(model, loss, x, y, backend):
    """Steps of `model.fit` over one batch, which lies on the device from the beginning."""
    model.compile(
        keras.optimizers.AdamW(1e-4, weight_decay=0.01),
        loss,
        jit_compile=backend == "jax",
    )
    if backend == "torch-compiled":
        kt.training.compile_step(model, with_optimizer=True)
    x, y = keras.tree.map_structure(keras.ops.convert_to_tensor, (x, y))

    def batches():
        while True:
            yield x, y

    def block():
        clock = Clock()
        model.fit(batches(), steps_per_epoch=STEPS + 1, verbose=0, callbacks=[clock])
        return clock.seconds / STEPS

    return {"": block}


class Clock(keras.callbacks.Callback):
    """Seconds from the end of the first step to the end of the last one.

    Keras calls it from a thread with numbers of the step, which waits for them: the loop itself never waits. On JAX a
    step is one program, which has ended when its loss is there; torch goes on and is waited for.
    """

    async_safe = True

    def __init__(self):
        super().__init__()
        self.ends = {}

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        if batch in (0, STEPS):
            synchronize()
        self.ends[batch] = time.perf_counter()

    @property
    def seconds(self):
        return self.ends[STEPS] - self.ends[0]


def synchronize(result=None):
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return result


WAYS = {"matmul": matmul, "gpt2": gpt2, "vit": vit, "translation": translation, "generate": generate}
