"""The image encoder of CLIP: a ViT with a norm before its blocks, and one of the class token alone behind them."""

import keras

from keras_transformer.pretrained.families import clip_text, towers
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact


def states(fields):
    """From images to `(images, [what goes into the first block, what comes out of it, ...])`."""
    fields.ignore("projection_dim")
    images, x = towers.patch_sequence(fields, patch_size=32, use_bias=False, prefix="image_")
    x = towers.norm(fields, 1e-5, "image_embedding_norm")(x)
    return images, clip_text.blocks(fields, x, "image_")


def encode(fields):
    """From images to `(inputs, hidden states [B, T, dim], pooled [B, dim])`."""
    images, (*_, x) = states(fields)
    return [images], x, towers.norm(fields, 1e-5, "image_norm")(x[:, 0])


def build(fields, task, stored):
    inputs, hidden_states, pooled = encode(fields)
    outputs = {"hidden_states": hidden_states}
    if task == "bare":
        outputs["pooled"] = pooled
    else:
        dim = fields.take("projection_dim", default=512)
        outputs["image_embedding"] = clip_text.project(pooled, dim, "image_projection")
    return keras.Model(inputs, outputs, name=fields.family)


FAMILY = Family(
    build=build,
    tasks={"CLIPVisionModel": "bare", "CLIPVisionModelWithProjection": "projection"},
    weights={
        "image_patches/projection": "embeddings.patch_embedding",
        "image_class_token": exact("embeddings.class_embedding", (-1,)),
        "image_position": "embeddings.position_embedding",
        "image_embedding_norm": "pre_layrnorm",
        **clip_text.block_weights("image_"),
        "image_norm": "post_layernorm",
    },
    heads={"image_projection": "visual_projection"},
    prefix="vision_model.",
)
