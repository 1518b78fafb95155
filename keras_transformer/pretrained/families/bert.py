"""BERT: post-norm encoder with learned positions and segments."""

from keras_transformer.pretrained.families import parts
from keras_transformer.pretrained.families.encoder import Encoder
from keras_transformer.pretrained.family import Family


def encoder(fields, offset=0):
    """The encoder of BERT's configurations, which RoBERTa's are as well, save for where positions begin."""
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("tie_word_embeddings", True)
    fields.only("position_embedding_type", "absolute")
    fields.ignore("pad_token_id")
    whole = Encoder(
        fields,
        fields.take("hidden_size", default=768),
        fields.take("num_hidden_layers", default=12),
        fields.take("num_attention_heads", default=12),
        fields.take("intermediate_size", default=3072),
        parts.activation(fields, "hidden_act", "gelu"),
        fields.take("hidden_dropout_prob", default=0.1),
        fields.take("attention_probs_dropout_prob", default=0.1),
        fields.take("layer_norm_eps", default=1e-12),
    )
    longest = fields.take("max_position_embeddings", default=512) - offset
    whole.encode(longest, offset, fields.take("type_vocab_size", default=2))
    return whole


def build(fields, task, stored):
    whole = encoder(fields)
    dropout = fields.take("classifier_dropout", default=whole.dropout)
    if task == "masked_lm":
        return whole.model(whole.token_logits())
    if task == "token_classification":
        return whole.model(whole.labels(whole.hidden_states, dropout))
    if task == "question_answering":
        return whole.model(whole.answers())
    outputs = {"hidden_states": whole.hidden_states}
    if "pooler.dense.weight" in stored or task == "sequence_classification":
        outputs["pooled"] = whole.dense(whole.first_token(), whole.dim, "pooler", "tanh")
    return whole.model(outputs if task == "bare" else whole.labels(outputs["pooled"], dropout))


WEIGHTS = {
    "embedding": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "encoder_block_{i}/self_attention/query": "encoder.layer.{i}.attention.self.query",
    "encoder_block_{i}/self_attention/key": "encoder.layer.{i}.attention.self.key",
    "encoder_block_{i}/self_attention/value": "encoder.layer.{i}.attention.self.value",
    "encoder_block_{i}/self_attention/output": "encoder.layer.{i}.attention.output.dense",
    "encoder_block_{i}/self_attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "encoder_block_{i}/feed_forward/up": "encoder.layer.{i}.intermediate.dense",
    "encoder_block_{i}/feed_forward/down": "encoder.layer.{i}.output.dense",
    "encoder_block_{i}/feed_forward_norm": "encoder.layer.{i}.output.LayerNorm",
    "pooler": "pooler.dense",
}


def tasks(name):
    """The architectures that BERT and its kin have by the name of the family."""
    return {
        f"{name}Model": "bare",
        f"{name}ForMaskedLM": "masked_lm",
        f"{name}ForSequenceClassification": "sequence_classification",
        f"{name}ForTokenClassification": "token_classification",
        f"{name}ForQuestionAnswering": "question_answering",
    }


FAMILY = Family(
    build=build,
    tasks=tasks("Bert"),
    weights=WEIGHTS,
    heads={
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "logits_bias": "cls.predictions",
        "labels": "classifier",
        "answers": "qa_outputs",
        "next_sentence": "cls.seq_relationship",
    },
    prefix="bert.",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    spellings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
