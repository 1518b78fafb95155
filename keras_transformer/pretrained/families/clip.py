"""CLIP: an encoder of images and one of texts, whose projections agree where an image and a text belong together."""

import keras
from keras import ops

from keras_transformer.layers import LogitScale
from keras_transformer.pretrained.families import clip_text, clip_vision
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact, inside


def build(fields, task, stored):
    fields.ignore("logit_scale_init_value")  # The file has the scale itself.
    dim = fields.take("projection_dim", default=512)
    text_inputs, _, text = clip_text.encode(_part(fields, "text_config"))
    image_inputs, _, image = clip_vision.encode(_part(fields, "vision_config"))
    text = keras.layers.UnitNormalization(name="text_unit")(clip_text.project(text, dim, "text_projection"))
    image = keras.layers.UnitNormalization(name="image_unit")(clip_text.project(image, dim, "image_projection"))
    logits = LogitScale(name="logit_scale")(ops.matmul(image, ops.transpose(text)))  # [images, texts]
    outputs = {"logits_per_image": logits, "image_embedding": image, "text_embedding": text}
    return keras.Model([*image_inputs, *text_inputs], outputs, name=fields.family)


def _part(fields, name):
    """One encoder's fields: early configurations have them twice, and the second time is what counts."""
    second = f"{name}_dict"
    fields.ignore(name)
    return fields.part(name if fields.take(second) is None else second)


FAMILY = Family(
    build=build,
    tasks={"CLIPModel": "bare"},
    weights={
        **inside("text_model.", clip_text.FAMILY.weights),
        **inside("vision_model.", clip_vision.FAMILY.weights),
        **clip_text.FAMILY.heads,
        **clip_vision.FAMILY.heads,
        "logit_scale": exact("logit_scale", ()),
    },
)
