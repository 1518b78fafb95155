"""Functional-API models made of the library's layers."""

from keras_transformer.models.causal_lm import causal_lm
from keras_transformer.models.image_captioner import image_captioner
from keras_transformer.models.packed import packed
from keras_transformer.models.resize_positions import resize_positions
from keras_transformer.models.speech_recognizer import speech_recognizer
from keras_transformer.models.text_classifier import text_classifier
from keras_transformer.models.transformer import transformer
from keras_transformer.models.vision_transformer import vision_transformer

__all__ = [
    "causal_lm",
    "image_captioner",
    "packed",
    "resize_positions",
    "speech_recognizer",
    "text_classifier",
    "transformer",
    "vision_transformer",
]
