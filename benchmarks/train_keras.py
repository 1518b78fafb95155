"""The sides of `train.py` that run on Keras: the same models, of this library's layers and of KerasHub's."""

import time
from types import SimpleNamespace

import keras
import numpy as np

import keras_transformer as kt


def training(case, s, side):
    """Functions that take a step and return its seconds, without XLA (or `torch.compile`) and with it."""
    return {f" {'jit' if jit else 'no jit'}": step_of(case, s, side, jit) for jit in (False, True)}


def step_of(case, s, side, jit):
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = MODELS[case](s, ours(s) if side == "ours" else keras_hub(s))
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.01), loss_of(case, side), jit_compile=jit)
    batches = kt.pipelines.prefetched(tf.data.Dataset.from_tensors(data_of(case, s)).repeat(2))

    def step():
        clock = Clock()
        model.fit(batches, verbose=0, callbacks=[clock])
        return clock.ends[1] - clock.ends[0]

    return step


class Clock(keras.callbacks.Callback):
    """When each step of `fit` ended: Keras has the numbers of a step before it calls."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


def loss_of(case, side):
    if side == "ours" and case in ("encoder_decoder", "causal_lm"):
        return kt.training.SmoothedCrossEntropy(0.0)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data_of(case, s):
    random = np.random.default_rng(0)
    if case in ("encoder", "vit"):
        shape = (s["length"], s["dim"]) if case == "encoder" else (s["image"], s["image"], 3)
        x = random.standard_normal((s["batch"], *shape), dtype="float32")
        return x, random.integers(0, s["classes"], s["batch"]).astype("int32")
    ids = [random.integers(1, s["vocabulary"], (s["batch"], s["length"])).astype("int32") for _ in range(3)]
    return (ids[0] if case == "causal_lm" else {"source_ids": ids[0], "target_ids": ids[1]}), ids[2]


def ours(s):
    layers, dropout = kt.layers, s["dropout"]
    attention = layers.MultiHeadSelfAttention(s["heads"], dropout=dropout)
    causal = layers.MultiHeadSelfAttention(s["heads"], causal=True, dropout=dropout)
    cross = layers.CrossAttention(s["heads"], dropout=dropout)

    def embed(ids):
        embedding = keras.layers.ReversibleEmbedding(s["vocabulary"], s["dim"], mask_zero=True)
        x = layers.PositionalEmbedding("learned", s["length"])(embedding(ids))
        return layers.Dropout(dropout)(x), embedding

    def vit(images):
        model = kt.models.vision_transformer(
            images.shape[1:], s["classes"], s["patch"], dim=s["dim"], depth=s["depth"], num_heads=s["heads"],
            hidden_dim=s["hidden"], dropout=dropout,
        )  # fmt: skip
        return model(images)

    return SimpleNamespace(
        embed=embed,
        encoder=lambda: layers.EncoderBlock(attention, s["hidden"], dropout=dropout),
        decoder=lambda: layers.DecoderBlock(causal, s["hidden"], cross, dropout=dropout),
        causal=lambda: layers.DecoderBlock(causal, s["hidden"], dropout=dropout),
        vit=vit,
    )


def keras_hub(s):
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError("This side needs keras-hub: `pip install keras-transformer-layers[bench]`.") from error
    layers, dropout = keras_hub.layers, s["dropout"]
    options = {"dropout": dropout, "activation": "gelu", "normalize_first": True}

    def embed(ids):
        layer = layers.TokenAndPositionEmbedding(s["vocabulary"], s["length"], s["dim"], mask_zero=True)
        return keras.layers.Dropout(dropout)(layer(ids)), layer.token_embedding

    def vit(images):
        backbone = keras_hub.models.ViTBackbone(
            images.shape[1:], s["patch"], s["depth"], s["heads"], s["dim"], s["hidden"], dropout, dropout
        )
        return keras.layers.Dense(s["classes"])(backbone(images)[:, 0])

    return SimpleNamespace(
        embed=embed,
        encoder=lambda: layers.TransformerEncoder(s["hidden"], s["heads"], **options),
        decoder=lambda: layers.TransformerDecoder(s["hidden"], s["heads"], **options),
        causal=lambda: layers.TransformerDecoder(s["hidden"], s["heads"], **options),
        vit=vit,
    )


def encoder(s, side):
    features = x = keras.Input((s["length"], s["dim"]))
    for _ in range(s["depth"]):
        x = side.encoder()(x)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    return keras.Model(features, keras.layers.Dense(s["classes"])(x))


def encoder_decoder(s, side):
    source, target = (keras.Input((s["length"],), dtype="int32", name=f"{name}_ids") for name in ("source", "target"))
    context, _ = side.embed(source)
    x, embedding = side.embed(target)
    for _ in range(s["depth"]):
        context = side.encoder()(context)
    context = keras.layers.LayerNormalization()(context)
    for _ in range(s["depth"]):
        x = side.decoder()(x, context)
    return keras.Model([source, target], embedding(keras.layers.LayerNormalization()(x), reverse=True))


def causal_lm(s, side):
    ids = keras.Input((s["length"],), dtype="int32")
    x, embedding = side.embed(ids)
    for _ in range(s["depth"]):
        x = side.causal()(x)
    return keras.Model(ids, embedding(keras.layers.LayerNormalization()(x), reverse=True))


def vit(s, side):
    images = keras.Input((s["image"], s["image"], 3))
    return keras.Model(images, side.vit(images))


def matmul(size):
    x = keras.random.normal((size, size), seed=0)

    def block():
        started = time.perf_counter()
        keras.ops.convert_to_numpy(keras.ops.matmul(x, x))
        return time.perf_counter() - started

    return block


MODELS = {"encoder": encoder, "encoder_decoder": encoder_decoder, "vit": vit, "causal_lm": causal_lm}
