"""DeiT: ViT with a second learned token, which learned from a teacher and may have a head of its own."""

from keras_transformer.pretrained.families import vit
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact


def build(fields, task, stored):
    encoder = vit.Encoder(fields, ("class_token", "distillation_token"))
    if task == "bare":
        return encoder.model(encoder.bare(stored))
    if task == "image_classification":
        return encoder.model(encoder.labels())
    return encoder.model((encoder.labels(0, "class_labels") + encoder.labels(1, "distillation_labels")) / 2)


FAMILY = Family(
    build=build,
    tasks={
        "DeiTModel": "bare",
        "DeiTForImageClassification": "image_classification",
        "DeiTForImageClassificationWithTeacher": "distilled_image_classification",
    },
    weights={**vit.WEIGHTS, "distillation_token": exact("embeddings.distillation_token", (1, ...))},
    heads={
        **vit.FAMILY.heads,
        "class_labels": "cls_classifier",
        "distillation_labels": "distillation_classifier",
    },
    prefix="deit.",
    spellings=vit.SPELLINGS,
)
