"""RoBERTa: BERT whose positions begin after those of padding, without segments, with heads of its own."""

from keras_transformer.pretrained.families import bert
from keras_transformer.pretrained.family import Family


def build(fields, task, stored):
    # The rows of the position table up to that of the padding token are never used.
    whole = bert.encoder(fields, offset=fields.take("pad_token_id", default=1) + 1)
    dropout = fields.take("classifier_dropout", default=whole.dropout)
    if task == "masked_lm":
        return whole.model(whole.token_logits(activation="gelu"))
    if task == "token_classification":
        return whole.model(whole.labels(whole.hidden_states, dropout))
    if task == "question_answering":
        return whole.model(whole.answers())
    if task == "sequence_classification":
        x = whole.drop(whole.first_token(), dropout, "first_token_dropout")
        x = whole.dense(x, whole.dim, "label_transform", "tanh")
        return whole.model(whole.labels(x, dropout, "label_projection"))
    outputs = {"hidden_states": whole.hidden_states}
    if "pooler.dense.weight" in stored:
        outputs["pooled"] = whole.dense(whole.first_token(), whole.dim, "pooler", "tanh")
    return whole.model(outputs)


FAMILY = Family(
    build=build,
    tasks=bert.tasks("Roberta"),
    weights=bert.WEIGHTS,
    heads={
        "transform": "lm_head.dense",
        "transform_norm": "lm_head.layer_norm",
        "logits_bias": "lm_head",
        "label_transform": "classifier.dense",
        "label_projection": "classifier.out_proj",
        "labels": "classifier",
        "answers": "qa_outputs",
    },
    prefix="roberta.",
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    spellings=bert.FAMILY.spellings,
)
