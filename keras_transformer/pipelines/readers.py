"""From raw inputs to what a model reads: one small class for each kind of input.

A reader is called with a list of raw inputs, and returns a dict of the model's inputs. Its method `in_graph` returns
what does the same with tensors of raw inputs inside of a TensorFlow graph (see `graph_readers`).
"""

import copy
import dataclasses

import keras
from keras import ops

from keras_transformer.generation.batches import pad_rows
from keras_transformer.generation.graph import mask_name
from keras_transformer.pipelines.images import ImagePreprocessor

FILL = "<FILL_ME>"
INFILLING = ("▁<PRE>", "▁<SUF>", "▁<MID>")


class TextReader:
    """Texts as the ids of their tokens.

    Args:
        tokenizer: `tokenizers.Tokenizer`, or what has its methods `encode_batch` and `token_to_id`.
        input_name: str. The input of the model that the ids go to.

    Code Llama's tokenizer fills in: what `<FILL_ME>` stands for in a text, between its beginning and its end, is what
    the model is asked for.

    Example:

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"dogs": 0, "run": 1}))
    >>> TextReader(tokenizer, "token_ids")(["dogs", "run"])
    {'token_ids': [[0], [1]]}
    """

    def __init__(self, tokenizer, input_name):
        self.tokenizer = tokenizer
        self.input_name = input_name
        self.infilling = None if None in map(tokenizer.token_to_id, INFILLING) else Infilling(tokenizer)

    def __call__(self, texts):
        return {self.input_name: self.rows(texts)}

    def in_graph(self, model, pad_id=0):
        from keras_transformer.pipelines.graph_readers import GraphTexts

        mask = mask_of(self.input_name, model)
        return GraphTexts(self.tokenizer, self.input_name, mask, pad_id, fills_in=self.infilling is not None)

    def rows(self, texts):
        """The ids of each text, in a list."""
        check_texts(texts)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        if self.infilling is not None:
            rows = [self.infilling(text) if FILL in text else row for text, row in zip(texts, rows, strict=True)]
        if not all(rows):
            raise ValueError(f"A text must have a token; number {rows.index([])} of the batch has none: it is empty.")
        return rows


class Infilling:
    """The prompt that asks Code Llama for the middle of a text.

    Args:
        tokenizer: `tokenizers.Tokenizer` with the tokens of infilling.

    Reference: [Code Llama: Open Foundation Models for Code](https://arxiv.org/abs/2308.12950), section 2.3.
    """

    def __init__(self, tokenizer):
        from tokenizers import normalizers, pre_tokenizers

        self.begin, self.end = frame(tokenizer)
        self.prefix_id, self.suffix_id, self.middle_id = map(tokenizer.token_to_id, INFILLING)
        self._whole = tokenizer
        self._part = copy.deepcopy(tokenizer)
        self._part.normalizer = normalizers.Replace(" ", "▁")
        self._part.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)

    def __call__(self, text):
        parts = text.split(FILL)
        if len(parts) != 2:
            raise ValueError(f"A text must hold {FILL} once to be filled in; received {text!r}.")
        prefix, suffix = parts
        if not suffix:  # Then it is a text to go on with.
            return self._whole.encode(prefix).ids
        middle = [self.prefix_id, *self._ids(f" {prefix}"), self.suffix_id, *self._ids(suffix), self.middle_id]
        return self.begin + middle + self.end

    def _ids(self, text):
        return self._part.encode(text, add_special_tokens=False).ids


class PairReader:
    """Texts, or pairs of texts, padded to the longest one: for models that read both ways.

    Args:
        tokenizer: `tokenizers.Tokenizer`.
        pad_id: int. What rows are filled up with.
        has_segments: boolean. Whether the model is told which of the two texts a token is of.

    Example:

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"dogs": 1, "run": 2}))
    >>> PairReader(tokenizer)(["dogs", ("dogs", "run")])["token_ids"].tolist()
    [[1, 0], [1, 2]]
    """

    def __init__(self, tokenizer, pad_id=0, has_segments=False):
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.has_segments = has_segments

    def __call__(self, texts):
        is_pair = [isinstance(text, list | tuple) and len(text) == 2 for text in texts]
        texts = [tuple(text) if pair else text for text, pair in zip(texts, is_pair, strict=True)]
        check_texts([part for text, pair in zip(texts, is_pair, strict=True) for part in (text if pair else [text])])
        encodings = self.tokenizer.encode_batch(texts)
        rows = [encoding.ids for encoding in encodings]
        inputs = {
            "token_ids": pad_rows(rows, self.pad_id),
            "padding_mask": pad_rows([[1] * len(row) for row in rows], 0),
        }
        if self.has_segments:
            inputs["segment_ids"] = pad_rows([encoding.type_ids for encoding in encodings], 0)
        return inputs

    def in_graph(self, model, pad_id=0):
        from keras_transformer.pipelines.graph_readers import GraphTexts

        segments = "segment_ids" if self.has_segments else None
        return GraphTexts(self.tokenizer, "token_ids", "padding_mask", self.pad_id, segments)


@keras.saving.register_keras_serializable(package="keras_transformer")
class ImageReader:
    """Images as the batch that a model reads.

    Args:
        preprocessor: `ImagePreprocessor`.
        shape: tuple `(height, width, channels)` that the model asks for.

    Example:

    >>> import numpy as np
    >>> read = ImageReader(kt.pipelines.ImagePreprocessor(size=(8, 8)), (8, 8, 3))
    >>> read([np.zeros((20, 10, 3), "uint8")])["images"].shape
    (1, 8, 8, 3)
    """

    def __init__(self, preprocessor, shape):
        self.preprocessor = preprocessor
        self.shape = tuple(shape)

    def __call__(self, images):
        batch = self.preprocessor(images)
        if batch.shape[1:] != self.shape:
            raise ValueError(
                f"The preprocessor must make images of {self.shape}, which the model reads; it made "
                f"them of {batch.shape[1:]}. Correct its `size` and `crop`."
            )
        return {"images": batch}

    def in_graph(self, model, pad_id=0):
        from keras_transformer.pipelines.graph_readers import GraphImages

        return GraphImages(self.preprocessor)

    def get_config(self):
        return {"preprocessor": dataclasses.asdict(self.preprocessor), "shape": self.shape}

    @classmethod
    def from_config(cls, config):
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in config["preprocessor"].items()}
        return cls(ImagePreprocessor(**options), config["shape"])


class SoundReader:
    """Sounds as spectra, and what the decoder is to begin with.

    Args:
        preprocessor: `SoundPreprocessor`.
        prompt: `SpeechPrompt`.
        model: the model, which may have to detect the language.

    Example:

    >>> import numpy as np
    >>> prompt = kt.pipelines.SpeechPrompt([1, 2])
    >>> inputs = SoundReader(kt.pipelines.SoundPreprocessor(seconds=1), prompt, None)([np.zeros(8000)])
    >>> inputs["features"].shape, inputs["target_ids"].tolist()
    ((1, 100, 80), [[1, 2]])
    """

    def __init__(self, preprocessor, prompt, model):
        self.preprocessor = preprocessor
        self.prompt = prompt
        self.model = model

    def __call__(self, sounds):
        features = self.preprocessor(sounds)
        return {"features": features, "target_ids": ops.convert_to_numpy(self.prompt(self.model, features))}

    def in_graph(self, model, pad_id=0):
        from keras_transformer.pipelines.graph_readers import GraphSounds

        return GraphSounds(self.preprocessor, self.prompt, self.model)


class ImageTextReader:
    """Pairs of an image and a text, in which `<image>` stands for the image once.

    Args:
        read_images: `ImageReader`.
        tokenizer: `tokenizers.Tokenizer`.
        placeholder: int. The token that holds a place for a vector of the image.
        count: int. How many vectors an image has.
        begin_behind_image: str. The token that follows the image in prompts that see themselves in both directions,
            and which end with a new line; the image may be left out of their text. None for others.

    Raises:
        ValueError: if the tokenizer does not know the token `placeholder`.

    Example:

    >>> import numpy as np
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> tokenizer = Tokenizer(models.WordLevel({"look": 0, "<image>": 1}))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> read_images = ImageReader(kt.pipelines.ImagePreprocessor(size=(8, 8)), (8, 8, 3))
    >>> read = ImageTextReader(read_images, tokenizer, placeholder=1, count=3)
    >>> read([(np.zeros((20, 10, 3), "uint8"), "look <image>")])["token_ids"]
    [[0, 1, 1, 1]]
    """

    def __init__(self, read_images, tokenizer, placeholder, count, begin_behind_image=None):
        self.read_images = read_images
        self.tokenizer = tokenizer
        self.placeholder = placeholder
        self.count = count
        self.image = tokenizer.id_to_token(placeholder)
        if self.image is None or tokenizer.encode(self.image, add_special_tokens=False).ids != [placeholder]:
            raise ValueError(
                f"The tokenizer must have a token of the id {placeholder}, which stands for an image, and find it in a "
                f"text; received one to which it is {self.image!r}."
            )
        self.begin_behind_image = begin_behind_image

    def __call__(self, pairs):
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str):
                raise ValueError(f"A raw input must be a pair (image, text); received {pair!r}.")
        images, texts = zip(*pairs, strict=True)
        return {**self.read_images(images), "token_ids": [self.row(text) for text in texts]}

    def in_graph(self, model, pad_id=0):
        from keras_transformer.pipelines.graph_readers import GraphImageTexts, GraphTexts

        texts = GraphTexts(self.tokenizer, "token_ids", mask_of("token_ids", model), pad_id)
        return GraphImageTexts(self.read_images.in_graph(model), texts, self)

    def row(self, text):
        """The ids of a prompt, with as many placeholders as an image has vectors."""
        before, after = self.around_image(text)
        text = f"{before}{self.image}{after}"
        ids = self.tokenizer.encode(text, add_special_tokens=self.begin_behind_image is None).ids
        place = ids.index(self.placeholder)
        return ids[:place] + [self.placeholder] * self.count + ids[place + 1 :]

    def around_image(self, text):
        """What stands before the image and behind it in a prompt."""
        is_prefix = self.begin_behind_image is not None
        parts = ["", text] if is_prefix and self.image not in text else text.split(self.image)
        if len(parts) != 2:
            raise ValueError(f"A text must hold {self.image} once, where its image belongs; received {text!r}.")
        before, after = parts
        return before, f"{self.begin_behind_image}{after}\n" if is_prefix else after


def mask_of(input_name, model):
    """The input of a model that says which tokens of another are real, or None."""
    name = mask_name(input_name)
    return name if name in [x.name for x in model.inputs] else None


def check_texts(texts):
    """Raises where something is not a text."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"A raw input must be a text, a string; received {text!r}.")


def frame(tokenizer):
    """The ids that a tokenizer puts before and behind a text."""
    # Any token will do for the text, as only the others are looked at.
    encoding = next(
        encoding
        for encoding in (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "the", "0", "."))
        if len(encoding)
    )
    whole = tokenizer.post_process(encoding)
    place = next(i for i, is_special in enumerate(whole.special_tokens_mask) if not is_special)
    return whole.ids[:place], whole.ids[place + len(encoding) :]
