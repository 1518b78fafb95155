"""Text, images or sound to text with a checkpoint."""

from pathlib import Path

import tensorflow as tf

from keras_transformer.generation import Generator
from keras_transformer.generation.batches import pad_rows
from keras_transformer.layers import Placeholders
from keras_transformer.pipelines.answers import BestLabel, GeneratedText
from keras_transformer.pipelines.images import ImagePreprocessor
from keras_transformer.pipelines.readers import (
    ImageReader,
    ImageTextReader,
    PairReader,
    SoundReader,
    TextReader,
)
from keras_transformer.pipelines.saving import check_exportable, save_graph
from keras_transformer.pipelines.sounds import SoundPreprocessor
from keras_transformer.pipelines.speech_prompt import SpeechPrompt
from keras_transformer.pipelines.tokenizer_files import SpecialTokens, read_tokenizer
from keras_transformer.pretrained import load
from keras_transformer.pretrained.checkpoint import read_json

END_OF_MIDDLE = "▁<EOT>"


class PretrainedPipeline:
    """From raw inputs to text: what reads them, and what answers.

    Args:
        read: function from a list of raw inputs to a dict of what the model reads, such as a `TextReader`.
        answer: function from this dict to a list of strings, such as `GeneratedText` or `BestLabel`.

    Example:

    >>> from tokenizers import Tokenizer, models
    >>> from keras_transformer.pipelines import GeneratedText, TextReader
    >>> words = ["<pad>", "<s>", "</s>", "<unk>", "dogs", "hunde"]
    >>> tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    >>> model = kt.models.transformer(6, 6, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> answer = GeneratedText(kt.generation.Generator(model, 1, 2), tokenizer, max_new_tokens=4)
    >>> pipeline = kt.pipelines.PretrainedPipeline(TextReader(tokenizer, "source_ids"), answer)
    >>> len(pipeline.predict(["dogs", "hunde"]))
    2
    """

    def __init__(self, read, answer):
        self.read = read
        self.answer = answer

    def predict(self, raw_inputs, batch_size=32):
        """Answers each of a list of raw inputs.

        Args:
            raw_inputs: list of what `read` takes: texts, images, sounds, or pairs of an image and a text.
            batch_size: int. How many of them to process at once.

        Returns:
            List of str, in the order of `raw_inputs`.

        Raises:
            ValueError: if `raw_inputs` is no list, or one of them cannot be read.
        """
        if not isinstance(raw_inputs, list | tuple):
            raise ValueError(f"`raw_inputs` must be a list of raw inputs; received {raw_inputs!r}.")
        results = []
        for begin in range(0, len(raw_inputs), batch_size):
            results.extend(self.answer(self.read(raw_inputs[begin : begin + batch_size])))
        return results

    def export(self, directory):
        """Writes a SavedModel that takes raw inputs and returns texts.

        Its signature `serving_default` takes what the pipeline reads, a batch of any size: `text`, strings; `images`,
        uint8 `[batch, height, width, channels]` of one size; or `sounds`, floats `[batch, samples]`, filled up with
        zeros. It returns `text`, as many strings. A process that loads it needs `tensorflow` and `tensorflow_text`,
        whose import registers the operations of tokenizers, and nothing of Keras:

        ```python
        import tensorflow as tf
        import tensorflow_text

        answer = tf.saved_model.load("saved_model").signatures["serving_default"]
        answer(text=tf.constant(["Good morning."]))["text"].numpy()
        ```

        Texts have the same tokens as in `predict`: before anything is written, that is tried with texts and tokens that
        tell tokenizers apart. Resized images may differ by a shade of 255 from those of `predict`. Pairs of texts,
        and `<FILL_ME>`, are for `predict` alone.

        Args:
            directory: str or path. An earlier SavedModel there is replaced.

        Raises:
            RuntimeError: if the backend is not TensorFlow.
            ValueError: if a part of the tokenizer or the preprocessor has no counterpart in TensorFlow, with its name.
            FileExistsError: if the directory holds something else than a SavedModel.
        """
        check_exportable("Load and export the checkpoint")
        read, answer = self.read.in_graph(self.answer.model, self.answer.pad_id), self.answer.in_graph()

        def serve(*raw_inputs):
            return {"text": answer(read(*raw_inputs))}

        module = tf.Module()
        # A SavedModel keeps the variables and tables that it can reach from its root.
        module.weights, module.read = [variable.value for variable in self.answer.model.variables], read
        module.serve = tf.function(serve, input_signature=read.signature, autograph=False)
        save_graph(module, directory, {"serving_default": module.serve})


def load_pretrained(directory, max_new_tokens=128, language=None, task=None, labels=None, **options):
    """Loads a checkpoint in the Hugging Face layout with its tokenizer and preprocessor, as a pipeline to text.

    What it takes follows from what its model reads:

    - texts, which an encoder-decoder turns into others, a decoder-only model goes on with, and a classifier labels,
      also in pairs; Code Llama gives what `<FILL_ME>` stands for in a text,
    - images (paths, Pillow images, or arrays uint8 `[height, width, channels]`), which get a label,
    - pairs `(image, text)`, with `<image>` in the text where the image belongs; PaliGemma's may leave it out,
    - sounds (paths, or arrays of floats at the model's own rate), which get a transcript.

    Args:
        directory: path of a directory with `config.json`, weights, and the files of the tokenizer (see
            `read_tokenizer`) or the preprocessor (see `ImagePreprocessor` and `SoundPreprocessor`) or both.
        max_new_tokens: int. How many tokens may be generated for one answer.
        language: str. Code of the language that is spoken, such as `"en"`; by default it is detected.
        task: str. `"transcribe"` or `"translate"` speech; by default what the checkpoint says.
        labels: strings, of which a model of images and texts, such as CLIP, finds the one that fits an image. For
            classifiers, they go before the names in the checkpoint.
        **options: arguments of `Generator`, which go before the settings of the checkpoint.

    Returns:
        `PretrainedPipeline`.

    Raises:
        FileNotFoundError: if files are missing; those that would do are listed.
        ValueError: as `kt.pretrained.load` and `Generator.from_pretrained`; or if the model neither generates nor
            classifies, or an option is not for a model of its kind.

    Example:

    >>> kt.pipelines.load_pretrained("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...
    """
    model = load(directory)
    inputs = {x.name: x for x in model.inputs}
    if not ("features" in inputs or language is None and task is None):
        raise ValueError(f"`language` and `task` are for models of speech; received {language!r} and {task!r}.")
    if isinstance(model.output, dict):
        return _matching(directory, model, inputs, labels, options)
    if len(model.output.shape) == 2:
        return _classifying(directory, model, inputs, labels, options)
    if labels is not None:
        raise ValueError(f"`labels` are for models that classify; this one generates, and received {labels!r}.")
    tokenizer = read_tokenizer(directory)
    generator = _generator(directory, model, tokenizer, options)
    answer = GeneratedText(generator, tokenizer, max_new_tokens)
    if "features" in inputs:
        prompt = SpeechPrompt.from_directory(directory, language, task)
        return PretrainedPipeline(SoundReader(SoundPreprocessor.from_directory(directory), prompt, model), answer)
    if "images" in inputs:
        return PretrainedPipeline(_image_text_reader(directory, model, inputs, tokenizer), answer)
    name = next(name for name in ("source_ids", "token_ids") if name in inputs)
    return PretrainedPipeline(TextReader(tokenizer, name), answer)


def _generator(directory, model, tokenizer, options):
    generator = Generator.from_pretrained(directory, model, **options)
    end_of_middle = tokenizer.token_to_id(END_OF_MIDDLE)
    if end_of_middle is None or "end_id" in options:
        return generator
    # What is filled in has an end of its own.
    config = generator.get_config()
    ends = config["end_id"] if isinstance(config["end_id"], list) else [config["end_id"]]
    return Generator.from_config(model, {**config, "end_id": [*(x for x in ends if x is not None), end_of_middle]})


def _image_reader(directory, inputs):
    shape = inputs["images"].shape[1:]
    return ImageReader(ImagePreprocessor.from_directory(directory, shape[-1]), shape)


def _image_text_reader(directory, model, inputs, tokenizer):
    layer = next(layer for layer in model.layers if isinstance(layer, Placeholders))
    begin = None
    if "segment_ids" in inputs:  # Its prompts see themselves in both directions, the image first.
        begin = SpecialTokens.from_directory(Path(directory)).named.get("bos_token")
        if begin is None:
            raise ValueError(f"tokenizer_config.json in {directory} must name the `bos_token` behind the image.")
        begin = begin.content
    return ImageTextReader(_image_reader(directory, inputs), tokenizer, layer.token_id, layer.count, begin)


def _classifying(directory, model, inputs, labels, options):
    """Texts or images to the names of their classes."""
    _refuse_options(options)
    configuration = read_json(directory, "config.json")
    count = model.output.shape[-1]
    kind = configuration.get("problem_type")
    if kind not in (None, "single_label_classification") or count < 2:
        raise ValueError(
            f"`problem_type` in {directory} must be 'single_label_classification' to choose one of several labels; "
            f"received {kind!r} with {count} labels. Use `kt.pretrained.load` for the numbers."
        )
    names = configuration.get("id2label") or {}
    answer = BestLabel(model, labels or [names.get(str(i), f"LABEL_{i}") for i in range(count)])
    if "images" in inputs:
        return PretrainedPipeline(_image_reader(directory, inputs), answer)
    pad_id = configuration.get("pad_token_id")
    reader = PairReader(read_tokenizer(directory), 0 if pad_id is None else pad_id, "segment_ids" in inputs)
    return PretrainedPipeline(reader, answer)


def _matching(directory, model, inputs, labels, options):
    """Images to the one of several texts that fits best."""
    if "logits_per_image" not in model.output:
        raise ValueError(
            f"The checkpoint in {directory} must generate or classify; its model has the outputs "
            f"{sorted(model.output)}. Use `kt.pretrained.load`, or another `architectures` in its config.json."
        )
    _refuse_options(options)
    if not labels:
        raise ValueError("`labels` must be the texts of which one is to fit an image; received none.")
    rows = [encoding.ids for encoding in read_tokenizer(directory).encode_batch(list(labels))]
    given = {"token_ids": pad_rows(rows, 0), "padding_mask": pad_rows([[1] * len(row) for row in rows], 0)}
    return PretrainedPipeline(_image_reader(directory, inputs), BestLabel(model, labels, given, "logits_per_image"))


def _refuse_options(options):
    if options:
        raise ValueError(f"The options of `Generator` are for models that generate; received {sorted(options)}.")
