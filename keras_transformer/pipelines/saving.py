"""How pipelines are written: all of one or nothing, with the files of their sources beside the model."""

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path

import keras
import tensorflow as tf

import keras_transformer

MODEL_FILE, PIPELINE_FILE = "model.keras", "pipeline.json"
PIPELINE_FILES = {MODEL_FILE, PIPELINE_FILE, "tokenizer", "source", "target"}
# Of `pipeline.json`: goes up when an earlier version of this package could not read what is written.
FORMAT = 1
# Of the signatures of a SavedModel: goes up when who calls them has to do so in another way. `examples/serve.py` asks.
SIGNATURES_FORMAT = 1
SAVED_MODEL_FILES = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


def save_part(part, directory):
    """Writes the files of a tokenizer or reader into a new directory, and returns its configuration."""
    if hasattr(part, "save_assets"):
        directory.mkdir()
        part.save_assets(str(directory))
    return keras.saving.serialize_keras_object(part)


def load_part(config, directory):
    """The tokenizer or reader that `save_part` has written."""
    part = keras.saving.deserialize_keras_object(config)
    if hasattr(part, "load_assets"):
        part.load_assets(str(directory))
    return part


def write_config(config, directory):
    """Writes what a saved pipeline is made of besides its model and the files of its parts."""
    text = json.dumps({"format": FORMAT, "versions": _versions(), **config}, indent=2)
    (directory / PIPELINE_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(directory):
    """What `write_config` has written, or an error that says what the directory holds in its place."""
    path = directory / PIPELINE_FILE
    if not path.is_file():
        if (directory / "saved_model.pb").is_file():
            raise FileNotFoundError(
                f"`directory` must hold a saved pipeline; {directory} holds a SavedModel, which `export` has "
                "written and `tf.saved_model.load` reads."
            )
        raise FileNotFoundError(f"`directory` must hold a saved pipeline; there is no {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("format", 1)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`directory` must hold a saved pipeline; {path} is none: {error!r}.") from error
    if found != FORMAT:
        raise ValueError(
            f"`directory` must hold a pipeline of format {FORMAT}, which this version of keras_transformer reads; "
            f"{directory} has format {found!r}{_written_by(config)}."
        )
    return config


@contextlib.contextmanager
def blaming_other_versions(directory, config):
    """Where what is read fails and other versions have written it, says which."""
    try:
        yield
    except Exception as error:
        if config.get("versions", {}) == _versions():
            raise
        own = " and ".join(f"{name} {version}" for name, version in _versions().items())
        raise ValueError(
            f"`directory` must hold a pipeline that {own} can read; {directory} is one{_written_by(config)}: {error}"
        ) from error


def _versions():
    return {"keras_transformer": keras_transformer.__version__, "keras": keras.__version__}


def _written_by(config):
    versions = " and ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
    return f", written by {versions}" if versions else ""


def check_exportable(what):
    """Raises where there is no TensorFlow graph to write."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`export` writes a TensorFlow graph and needs the TensorFlow backend; the backend is "
            f"{keras.backend.backend()}. {what} in a process with KERAS_BACKEND=tensorflow."
        )


def save_graph(module, directory, signatures):
    """Writes a `tf.Module` as a SavedModel, which tells by whom it was written where the format has room for that."""
    with written_at_once(directory, SAVED_MODEL_FILES) as staging:
        tf.saved_model.save(module, staging, signatures=signatures)
        (staging / "assets.extra").mkdir()
        text = json.dumps({"format": SIGNATURES_FORMAT, "versions": _versions()}, indent=2)
        (staging / "assets.extra" / "keras_transformer.json").write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_at_once(directory, own_files):
    """Yields a new directory beside `directory` that takes its place when the block has ended without an error."""
    directory = Path(os.path.abspath(directory))
    if directory.exists():
        others = sorted({path.name for path in directory.iterdir()} - own_files) if directory.is_dir() else ["a file"]
        if others:
            raise FileExistsError(
                f"`directory` must be new, empty or the earlier result of the same method; received {directory}, "
                f"which holds {', '.join(others[:10])}."
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        if directory.exists():
            earlier = staging.with_name(f"{staging.name}.earlier")
            directory.rename(earlier)
            staging.rename(directory)
            shutil.rmtree(earlier)
        else:
            staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
