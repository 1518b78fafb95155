"""Reading what pipelines have written."""

from pathlib import Path

import keras

from keras_transformer.generation import AttentionRescoring, Generator
from keras_transformer.pipelines.classifier import Classifier
from keras_transformer.pipelines.pipeline import Pipeline
from keras_transformer.pipelines.saving import MODEL_FILE, blaming_other_versions, load_part, read_config


def load(directory):
    """Loads what `Pipeline.save` or `Classifier.save` wrote, in any process and on any backend.

    Args:
        directory: String or path.

    Returns:
        A `Pipeline` or `Classifier` that gives the same answers as the saved one. Its model is not compiled for
        training.

    Raises:
        FileNotFoundError: If there is no saved pipeline in the directory, but a SavedModel, say.
        ValueError: If another version of this package or of Keras has written it, in a way that this one cannot read.

    Example:

    >>> import tempfile
    >>> from keras_transformer.generation import Generator
    >>> from keras_transformer.pipelines import Pipeline, train_subwords
    >>> tokenizer = train_subwords(["ein spiel@@ haus"])
    >>> model = kt.models.transformer(7, 7, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> pipeline = Pipeline(Generator(model, start_id=1, end_id=2), tokenizer, tokenizer, max_new_tokens=4)
    >>> directory = tempfile.mkdtemp()
    >>> pipeline.save(directory)
    >>> load(directory).predict(["ein haus"]) == pipeline.predict(["ein haus"])
    True
    """
    directory = Path(directory)
    config = read_config(directory)
    with blaming_other_versions(directory, config):
        model = keras.saving.load_model(directory / MODEL_FILE, compile=False)
        if "labels" in config:
            return Classifier(model, load_part(config["source"], directory / "source"), config["labels"])
        tokenizers = {name: load_part(part, directory / name) for name, part in config["tokenizers"].items()}
        kind = AttentionRescoring if "ctc_weight" in config["generator"] else Generator
        return Pipeline(
            kind.from_config(model, config["generator"]),
            tokenizers.get("tokenizer") or tokenizers["source"],
            tokenizers.get("tokenizer") or tokenizers["target"],
            config["max_new_tokens"],
        )
