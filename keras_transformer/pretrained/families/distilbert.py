"""DistilBERT: BERT with half of the layers, no segments and no pooler, in a spelling of its own."""

from keras_transformer.pretrained.families import bert, parts
from keras_transformer.pretrained.families.encoder import Encoder
from keras_transformer.pretrained.family import Family


def build(fields, task, stored):
    fields.only("tie_word_embeddings", True)
    fields.ignore("pad_token_id sinusoidal_pos_embds")  # The sinusoids, if such they are, stand in the file.
    whole = Encoder(
        fields,
        fields.take("dim", "hidden_size", default=768),
        fields.take("n_layers", "num_hidden_layers", default=6),
        fields.take("n_heads", "num_attention_heads", default=12),
        fields.take("hidden_dim", default=3072),
        parts.activation(fields, "activation", "gelu"),
        fields.take("dropout", default=0.1),
        fields.take("attention_dropout", default=0.1),
        epsilon=1e-12,
    )
    whole.encode(fields.take("max_position_embeddings", default=512))
    answer_dropout = fields.take("qa_dropout", default=0.1)
    label_dropout = fields.take("seq_classif_dropout", default=0.2)
    if task == "masked_lm":
        return whole.model(whole.token_logits())
    if task == "token_classification":
        return whole.model(whole.labels(whole.hidden_states, whole.dropout))
    if task == "question_answering":
        return whole.model(whole.answers(answer_dropout))
    if task == "sequence_classification":
        x = whole.dense(whole.first_token(), whole.dim, "label_transform", "relu")
        return whole.model(whole.labels(x, label_dropout))
    return whole.model({"hidden_states": whole.hidden_states})


FAMILY = Family(
    build=build,
    tasks=bert.tasks("DistilBert"),
    weights={
        "embedding": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "encoder_block_{i}/self_attention/query": "transformer.layer.{i}.attention.q_lin",
        "encoder_block_{i}/self_attention/key": "transformer.layer.{i}.attention.k_lin",
        "encoder_block_{i}/self_attention/value": "transformer.layer.{i}.attention.v_lin",
        "encoder_block_{i}/self_attention/output": "transformer.layer.{i}.attention.out_lin",
        "encoder_block_{i}/self_attention_norm": "transformer.layer.{i}.sa_layer_norm",
        "encoder_block_{i}/feed_forward/up": "transformer.layer.{i}.ffn.lin1",
        "encoder_block_{i}/feed_forward/down": "transformer.layer.{i}.ffn.lin2",
        "encoder_block_{i}/feed_forward_norm": "transformer.layer.{i}.output_layer_norm",
    },
    heads={
        "transform": "vocab_transform",
        "transform_norm": "vocab_layer_norm",
        "logits_bias": "vocab_projector",
        "label_transform": "pre_classifier",
        "labels": "classifier",
        "answers": "qa_outputs",
    },
    prefix="distilbert.",
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    spellings=bert.FAMILY.spellings,
)
