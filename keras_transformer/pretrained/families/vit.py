"""ViT: a pre-norm encoder of image patches behind a class token."""

import keras

from keras_transformer.layers import Dropout, MultiHeadSelfAttention
from keras_transformer.pretrained.families import parts, towers
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact


class Encoder:
    """The encoder of ViT's configurations, which DeiT's are as well, with the heads that may stand on it.

    Attributes:
        images: symbolic tensor `[B, height, width, channels]`.
        hidden_states: symbolic tensor `[B, T, dim]`.
    """

    def __init__(self, fields, tokens=("class_token",)):
        self.fields = fields
        self.pooler_dim = fields.take("pooler_output_size") or towers.dim(fields)
        self.pooler_activation = parts.activation(fields, "pooler_act", "tanh")
        fields.ignore("encoder_stride")  # It is of the head that restores masked images.
        dropout = fields.take("hidden_dropout_prob", default=0.0)
        attention = MultiHeadSelfAttention(
            fields.take("num_attention_heads", default=12),
            use_bias=True if fields.take("qkv_bias", default=True) else ["output"],
            dropout=fields.take("attention_probs_dropout_prob", default=0.0),
        )
        self.images, x = towers.patch_sequence(fields, tokens)
        x = Dropout(dropout, name="embedding_dropout")(x)
        x = towers.encoder_blocks(fields, x, attention, dropout=dropout)[-1]
        self.hidden_states = towers.norm(fields, name="encoder_norm")(x)

    def bare(self, stored):
        """Hidden states, and the pooled class token where the file has the weights for it."""
        outputs = {"hidden_states": self.hidden_states}
        if "pooler.dense.weight" in stored:
            dense = keras.layers.Dense(self.pooler_dim, self.pooler_activation, name="pooler")
            outputs["pooled"] = dense(self.hidden_states[:, 0])
        return outputs

    def labels(self, token=0, name="labels"):
        """One score for each label, from one of the learned tokens."""
        return keras.layers.Dense(parts.number_of_labels(self.fields), name=name)(self.hidden_states[:, token])

    def model(self, outputs):
        return keras.Model([self.images], outputs, name=self.fields.family)


def build(fields, task, stored):
    encoder = Encoder(fields)
    return encoder.model(encoder.bare(stored) if task == "bare" else encoder.labels())


WEIGHTS = {
    "class_token": exact("embeddings.cls_token", (1, ...)),
    "mask_token": exact("embeddings.mask_token", (1, ...)),
    "patches/projection": "embeddings.patch_embeddings.projection",
    "position": exact("embeddings.position_embeddings", (1, ...)),
    "encoder_block_{i}/self_attention_norm": "encoder.layer.{i}.layernorm_before",
    "encoder_block_{i}/self_attention/query": "encoder.layer.{i}.attention.attention.query",
    "encoder_block_{i}/self_attention/key": "encoder.layer.{i}.attention.attention.key",
    "encoder_block_{i}/self_attention/value": "encoder.layer.{i}.attention.attention.value",
    "encoder_block_{i}/self_attention/output": "encoder.layer.{i}.attention.output.dense",
    "encoder_block_{i}/feed_forward_norm": "encoder.layer.{i}.layernorm_after",
    "encoder_block_{i}/feed_forward/up": "encoder.layer.{i}.intermediate.dense",
    "encoder_block_{i}/feed_forward/down": "encoder.layer.{i}.output.dense",
    "encoder_norm": "layernorm",
    "pooler": "pooler.dense",
}

# The names of a model in memory, which files may have instead.
SPELLINGS = (
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

FAMILY = Family(
    build=build,
    tasks={"ViTModel": "bare", "ViTForImageClassification": "image_classification"},
    weights=WEIGHTS,
    heads={"labels": "classifier", "mask_decoder": "decoder.0"},
    prefix="vit.",
    spellings=SPELLINGS,
)
