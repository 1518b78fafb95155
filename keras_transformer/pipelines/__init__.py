"""From raw text to text: corpora, tokenizers, batches, and the pipeline that saves and exports them with a model."""

from keras_transformer.pipelines.answer_inputs import answer_inputs
from keras_transformer.pipelines.answers import BestLabel, GeneratedText
from keras_transformer.pipelines.batching import epoch_rows, prefetched, text_batches, token_batches
from keras_transformer.pipelines.captioned_images import CaptionedImages, read_captioned_images
from keras_transformer.pipelines.classifier import Classifier
from keras_transformer.pipelines.corpus import hold_out, number_pairs, read_pairs
from keras_transformer.pipelines.ctc_answers import ctc_texts
from keras_transformer.pipelines.error_rate import error_rate
from keras_transformer.pipelines.frame_readers import CepstrumReader, WaveReader
from keras_transformer.pipelines.image_batches import image_batches
from keras_transformer.pipelines.image_folders import (
    LabelledImages,
    read_image_archive,
    read_image_folder,
    split_by_class,
)
from keras_transformer.pipelines.images import ImagePreprocessor
from keras_transformer.pipelines.labelled_texts import emoji_names, read_labelled_texts, split_by_group
from keras_transformer.pipelines.language_data import (
    fill_in_the_middle,
    read_texts,
    token_stream,
    token_windows,
    train_byte_pairs,
)
from keras_transformer.pipelines.loading import load
from keras_transformer.pipelines.packing import packed_batches
from keras_transformer.pipelines.pipeline import Pipeline
from keras_transformer.pipelines.pretrained import PretrainedPipeline, load_pretrained
from keras_transformer.pipelines.readers import ImageReader, ImageTextReader, PairReader, SoundReader, TextReader
from keras_transformer.pipelines.sounds import SoundPreprocessor
from keras_transformer.pipelines.speech_batches import speech_batches
from keras_transformer.pipelines.speech_data import Recording, change_speed, read_recordings, split_recordings
from keras_transformer.pipelines.speech_prompt import SpeechPrompt
from keras_transformer.pipelines.token_reader import TokenReader
from keras_transformer.pipelines.tokenizer_files import read_tokenizer
from keras_transformer.pipelines.tokenizers import (
    SentencePieceTokenizer,
    SubwordTokenizer,
    WordPieceTokenizer,
    token_ids,
    train_sentence_piece,
    train_subwords,
    train_word_piece,
)
from keras_transformer.pipelines.word_tokenizer import WordTokenizer, train_words

__all__ = [
    "BestLabel",
    "CaptionedImages",
    "CepstrumReader",
    "Classifier",
    "GeneratedText",
    "ImagePreprocessor",
    "ImageReader",
    "ImageTextReader",
    "LabelledImages",
    "PairReader",
    "Pipeline",
    "PretrainedPipeline",
    "Recording",
    "SentencePieceTokenizer",
    "SoundPreprocessor",
    "SoundReader",
    "SpeechPrompt",
    "SubwordTokenizer",
    "TextReader",
    "TokenReader",
    "WaveReader",
    "WordPieceTokenizer",
    "WordTokenizer",
    "answer_inputs",
    "change_speed",
    "ctc_texts",
    "emoji_names",
    "epoch_rows",
    "error_rate",
    "fill_in_the_middle",
    "hold_out",
    "image_batches",
    "load",
    "load_pretrained",
    "number_pairs",
    "packed_batches",
    "prefetched",
    "read_captioned_images",
    "read_image_archive",
    "read_image_folder",
    "read_labelled_texts",
    "read_pairs",
    "read_recordings",
    "read_texts",
    "read_tokenizer",
    "split_by_class",
    "speech_batches",
    "split_by_group",
    "split_recordings",
    "text_batches",
    "token_batches",
    "token_ids",
    "token_stream",
    "token_windows",
    "train_byte_pairs",
    "train_sentence_piece",
    "train_subwords",
    "train_word_piece",
    "train_words",
]
