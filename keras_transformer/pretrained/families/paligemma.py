"""PaliGemma: SigLIP's image encoder, one projection, and Gemma or Gemma 2, which reads prompts in both directions."""

import dataclasses

import keras

from keras_transformer.pretrained.families import image_text, siglip_vision

DEFAULTS = {
    "image_token_index": 256000,
    "text_config": {"model_type": "gemma"},
    "vision_config": {"model_type": "siglip_vision_model"},
}


def _see(fields, vision_fields, states, dim):
    fields.only("projection_dim", dim)
    x = siglip_vision.norm(vision_fields)(states[-1])
    return keras.layers.Dense(dim, name="image_projection")(x)


def _finish(fields, language_model):
    return dataclasses.replace(language_model, tied=fields.take("tie_word_embeddings", default=True))


def family(configuration):
    return image_text.family(
        configuration,
        "PaliGemma",
        see=_see,
        projector={"image_projection": "multi_modal_projector.linear"},
        finish=_finish,
        defaults=DEFAULTS,
        unused=[r"head\..*"],
        prefix=True,
    )
