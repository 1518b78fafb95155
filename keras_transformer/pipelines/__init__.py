"""From raw text to text: corpora, tokenizers, batches, and the pipeline that saves and exports them with a model."""

from keras_transformer.pipelines.batching import token_batches
from keras_transformer.pipelines.corpus import hold_out, number_pairs, read_pairs
from keras_transformer.pipelines.pipeline import Pipeline, load
from keras_transformer.pipelines.pretrained import PretrainedPipeline, load_pretrained
from keras_transformer.pipelines.tokenizers import (
    SentencePieceTokenizer,
    SubwordTokenizer,
    WordPieceTokenizer,
    token_ids,
    train_sentence_piece,
    train_subwords,
    train_word_piece,
)

__all__ = [
    "Pipeline",
    "PretrainedPipeline",
    "SentencePieceTokenizer",
    "SubwordTokenizer",
    "WordPieceTokenizer",
    "hold_out",
    "load",
    "load_pretrained",
    "number_pairs",
    "read_pairs",
    "token_batches",
    "token_ids",
    "train_sentence_piece",
    "train_subwords",
    "train_word_piece",
]
