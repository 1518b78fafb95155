"""LLaVA: the patches of CLIP's image encoder, projected to stand among the tokens of LLaMA or its kin."""

import dataclasses

import keras
from keras import ops

from keras_transformer.pretrained.families import image_text, parts

DEFAULTS = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}


def _see(fields, vision_fields, states, dim):
    """The states that `vision_feature_layer` names, side by side, without the class token, through two layers."""
    whole = fields.one_of("vision_feature_select_strategy", ("default", "full"), "default") == "full"
    fields.take("vision_feature_layer")
    chosen = [states[i] if whole else states[i][:, 1:] for i in _used_states(fields.values)]
    x = chosen[0] if len(chosen) == 1 else ops.concatenate(chosen, axis=-1)
    use_bias = fields.take("multimodal_projector_bias", default=True)
    activation = parts.activation(fields, "projector_hidden_act", "gelu")
    x = keras.layers.Dense(dim, activation, use_bias=use_bias, name="image_projection_0")(x)
    return keras.layers.Dense(dim, use_bias=use_bias, name="image_projection_1")(x)


def _used_states(configuration):
    """Which states of the image encoder are read; number 0 goes into its first block."""
    count = _count(configuration)
    layers = configuration.get("vision_feature_layer", DEFAULTS["vision_feature_layer"])
    listed = [layers] if isinstance(layers, int) else layers
    if not listed or not all(isinstance(i, int) and -count - 1 <= i <= count for i in listed):
        raise ValueError(
            f"`vision_feature_layer` of a llava checkpoint must be the number of a state of its {count} blocks, from "
            f"{-count - 1} to {count}, or a list of them; received {layers!r}."
        )
    return [i % (count + 1) for i in listed]


def _count(configuration):
    return (configuration.get("vision_config") or {}).get("num_hidden_layers", 12)


def _finish(fields, language_model):
    # Either place may tie the output to the embedding. A bound of the logits is not taken over.
    tied = fields.take("tie_word_embeddings", default=False) or language_model.tied
    return dataclasses.replace(language_model, tied=tied, soft_cap=None)


def family(configuration):
    behind = range(max(_used_states(configuration)), _count(configuration))
    return image_text.family(
        configuration,
        "Llava",
        see=_see,
        projector={
            "image_projection_0": "multi_modal_projector.linear_1",
            "image_projection_1": "multi_modal_projector.linear_2",
        },
        finish=_finish,
        defaults=DEFAULTS,
        unused=[r"(post_layernorm|head)\..*", *(rf"encoder\.layers\.{i}\..*" for i in behind)],
    )
