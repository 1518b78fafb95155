"""What reads raw inputs, inside of a TensorFlow graph: the counterparts of `readers` in a SavedModel.

Each has a `signature`, a list of `tf.TensorSpec` with names, and is called with tensors of these to give the model's
inputs.
"""

import re

import tensorflow as tf

from keras_transformer.pipelines.graph_tokenizer import GraphTokenizer
from keras_transformer.pipelines.images import BICUBIC, BILINEAR, LANCZOS
from keras_transformer.pipelines.readers import FILL

METHODS = {BILINEAR: "bilinear", BICUBIC: "bicubic", LANCZOS: "lanczos3"}
TEXT = tf.TensorSpec([None], "string", name="text")


class GraphTexts(tf.Module):
    """Texts as rows of ids, and which of them are real.

    Args:
        tokenizer: the one of `tokenizers`.
        input_name: str. The input of the model that the ids go to.
        mask_name: str. The input that says which of them are real, or None.
        pad_id: int. What rows are filled up with.
        segment_name: str. An input that is 0 for all tokens of a single text, or None.
        fills_in: boolean. Whether the tokenizer has a prompt for what is missing in a text.
    """

    signature = [TEXT]

    def __init__(self, tokenizer, input_name, mask_name=None, pad_id=0, segment_name=None, fills_in=False):
        super().__init__()
        self.tokenizer = GraphTokenizer.of(tokenizer)
        self.input_name, self.mask_name, self.segment_name = input_name, mask_name, segment_name
        self.pad_id = pad_id
        self.fills_in = fills_in

    def __call__(self, texts):
        if self.fills_in:
            holes = tf.strings.regex_full_match(texts, f"(?s).*{re.escape(FILL)}.*")
            tf.debugging.Assert(~tf.reduce_any(holes), [f"A text must not hold {FILL}: filling in is not exported."])
        return self.inputs(self.tokenizer(texts))

    def inputs(self, rows):
        """The inputs of the model, from ragged ids."""
        tf.debugging.assert_positive(rows.row_lengths(), "A text must have a token.")
        inputs = {self.input_name: rows.to_tensor(self.pad_id)}
        if self.mask_name is not None:
            inputs[self.mask_name] = tf.ones_like(rows).to_tensor(0)
        if self.segment_name is not None:
            inputs[self.segment_name] = tf.zeros_like(inputs[self.input_name])
        return inputs


class GraphImages(tf.Module):
    """Images, all of one size, as the batch that a model reads.

    They are within a shade of what Pillow makes; where that begins with the height, as it does with some small images,
    a few shades may be between them.

    Args:
        preprocessor: `ImagePreprocessor`.

    Raises:
        ValueError: if TensorFlow does not have its filter.
    """

    def __init__(self, preprocessor):
        super().__init__()
        if preprocessor.size is not None and preprocessor.resample not in METHODS:
            raise ValueError(
                f"The preprocessor cannot be exported: `resample` must be one of {sorted(METHODS)} for TensorFlow; "
                f"received {preprocessor.resample}."
            )
        self.preprocessor = preprocessor
        self.signature = [tf.TensorSpec([None, None, None, preprocessor.channels], "uint8", name="images")]

    def __call__(self, images):
        preprocessor = self.preprocessor
        images = tf.cast(images, "float32")
        if preprocessor.background is not None:
            images = self._squared(images)
        if preprocessor.size is not None:
            height, width = self._target_size(images)
            # Pillow, too, resizes one side after the other, and goes back to whole shades each time.
            images = self._resized(images, tf.shape(images)[1], width)
            images = self._resized(images, height, width)
        if preprocessor.crop is not None:
            images = self._cropped(images)
        scaled = images * preprocessor.scale
        return {"images": (scaled - tf.constant(preprocessor.mean)) / tf.constant(preprocessor.std)}

    def _squared(self, images):
        height, width = tf.shape(images)[1], tf.shape(images)[2]
        edge = tf.maximum(height, width)
        top, left = (edge - height) // 2, (edge - width) // 2
        background = tf.constant(self.preprocessor.background, "float32")
        around = ((0, 0), (top, edge - height - top), (left, edge - width - left), (0, 0))
        return tf.pad(images - background, around) + background

    def _resized(self, images, height, width):
        method = METHODS[self.preprocessor.resample]
        images = tf.image.resize(images, (height, width), method=method, antialias=True)
        return tf.clip_by_value(tf.floor(images + 0.5), 0, 255)

    def _target_size(self, images):
        size = self.preprocessor.size
        if not isinstance(size, int):
            return size
        height, width = tf.shape(images)[1], tf.shape(images)[2]
        shorter = tf.minimum(height, width)
        return size * height // shorter, size * width // shorter

    def _cropped(self, images):
        around, begin = [(0, 0)], [0]
        for size, wanted in zip(tf.unstack(tf.shape(images)[1:3]), self.preprocessor.crop, strict=True):
            missing = tf.maximum(0, wanted - size)
            around.append((missing - missing // 2, missing // 2))
            begin.append((size + missing - wanted) // 2)
        images = tf.pad(images, [*around, (0, 0)])
        return tf.slice(images, [*begin, 0], [-1, *self.preprocessor.crop, -1])


class GraphSounds(tf.Module):
    """Sounds, filled up with zeros to one length, as spectra, and what the decoder is to begin with.

    Args:
        preprocessor: `SoundPreprocessor`.
        prompt: `SpeechPrompt`.
        model: the model, which may have to detect the language.
    """

    signature = [tf.TensorSpec([None, None], "float32", name="sounds")]

    def __init__(self, preprocessor, prompt, model):
        super().__init__()
        self.length = preprocessor.length
        # Not as attributes, of which a SavedModel would keep functions of their own.
        self._features = lambda sounds: preprocessor.converter(sounds)
        self._prompt = lambda features: prompt(model, features)

    def __call__(self, sounds):
        samples = tf.shape(sounds)[1]
        message = f"A sound must have at most {self.length} samples, as what the model was trained on."
        tf.debugging.assert_less_equal(samples, self.length, message)
        sounds = tf.pad(sounds, ((0, 0), (0, tf.maximum(0, self.length - samples))))
        sounds.set_shape([None, self.length])
        features = self._features(sounds)
        return {"features": features, "target_ids": self._prompt(features)}


class GraphImageTexts(tf.Module):
    """Images, and texts in which each of them has its place.

    Args:
        images: `GraphImages`.
        texts: `GraphTexts`.
        reader: `ImageTextReader`.
    """

    def __init__(self, images, texts, reader):
        super().__init__()
        self.images, self.texts = images, texts
        self.placeholder, self.count = reader.placeholder, reader.count
        self.image, self.begin = reader.image, reader.begin_behind_image
        self.signature = [*images.signature, TEXT]

    def __call__(self, images, texts):
        is_prefix = self.begin is not None
        if is_prefix:
            image = re.escape(self.image)
            has_image = tf.strings.regex_full_match(texts, f"(?s).*{image}.*")
            texts = tf.where(has_image, texts, tf.strings.join([self.image, texts]))
            texts = tf.strings.regex_replace(texts, f"(?s)^(.*{image})(.*)$", rf"\1{self.begin}\2" + "\n")
        rows = self.texts.tokenizer(texts, adds_special=not is_prefix)
        times = tf.where(rows == self.placeholder, self.count, 1)
        counts = tf.reduce_sum(tf.cast(rows == self.placeholder, "int32"), axis=1)
        tf.debugging.assert_equal(counts, 1, f"A text must hold {self.image} once, where its image belongs.")
        lengths = tf.reduce_sum(times, axis=1)
        rows = tf.RaggedTensor.from_row_lengths(tf.repeat(rows.flat_values, times.flat_values), lengths)
        return {**self.images(images), **self.texts.inputs(rows)}
