"""What models of images and text share: an image encoder, a projection, and a language model that reads both."""

from keras_transformer.pretrained.families import clip_vision, siglip_vision
from keras_transformer.pretrained.families.parts import Sight
from keras_transformer.pretrained.family import Family, find_family
from keras_transformer.pretrained.weights import inside

# `model_type` of an image encoder -> its hidden states, and its weights.
TOWERS = {
    "clip_vision_model": (clip_vision.states, clip_vision.FAMILY.weights),
    "siglip_vision_model": (siglip_vision.states, siglip_vision.WEIGHTS),
}

# Files of the hub, and the names of models in memory.
SPELLINGS = (
    (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def family(configuration, name, see, projector, finish, defaults, unused=(), prefix=False):
    """A family of models of images and text.

    Args:
        configuration: dict. The configuration of a checkpoint.
        name: str. What its architectures begin with.
        see: function of the fields, those of the image encoder, its states (see `TOWERS`) and the width of the
            language model to the vectors `[B, count, dim]` that this reads.
        projector: dict from layer paths to names in the file, of what `see` has of its own.
        finish: function of the fields and a `LanguageModel` as its own fields have it, to what it is here.
        defaults: dict of fields of the configuration; of the two parts only their `model_type`.
        unused: patterns of tensors of the image encoder that `see` does not use.
        prefix: boolean. Whether the prompt sees itself in both directions.

    Raises:
        ValueError: if there is no such image encoder or language model.
    """
    text, vision = (
        {**defaults[part], **(configuration.get(part) or {})}["model_type"] for part in ("text_config", "vision_config")
    )
    if vision not in TOWERS:
        raise ValueError(f"`vision_config.model_type` must be one of {sorted(TOWERS)}; received {vision!r}.")
    language = find_family({**(configuration.get("text_config") or {}), "model_type": text})
    if language.language_model is None:
        raise ValueError(f"`text_config.model_type` must be that of a decoder-only family; received {text!r}.")
    states, tower_weights = TOWERS[vision]

    def build(fields, task, stored):
        text_fields, vision_fields = fields.part("text_config", text), fields.part("vision_config", vision)
        fields.fill(defaults)
        # Whether a prefix sees itself is for this family to say; the number of its image tokens follows.
        text_fields.ignore("use_bidirectional_attention num_image_tokens tie_word_embeddings")
        # These repeat what one of the parts says, or are of the tokenizer and the loss.
        fields.ignore("ignore_index image_seq_length vocab_size hidden_size pad_token_id")
        language_model = finish(fields, language.language_model(text_fields))
        images, hidden_states = states(vision_fields)
        vectors = see(fields, vision_fields, hidden_states, language_model.dim)
        sight = Sight(images, vectors, fields.need("image_token_index", "image_token_id"), prefix)
        return language_model.model(fields.family, task, sight)

    return Family(
        build=build,
        tasks={f"{name}Model": "bare", f"{name}ForConditionalGeneration": "causal_lm"},
        weights={
            **inside("vision_tower.", tower_weights),
            **projector,
            **inside("language_model.model.", language.weights),
        },
        heads=inside("language_model.", language.heads),
        tied={f"language_model.{tied}": f"language_model.{other}" for tied, other in language.tied.items()},
        spellings=SPELLINGS,
        unused=tuple(rf"vision_tower\.{pattern}" for pattern in unused),
    )
