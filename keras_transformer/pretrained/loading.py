"""From a checkpoint directory to a functional model and back."""

import contextlib
import re
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_transformer.pretrained.checkpoint import Checkpoint, read_json, write_checkpoint
from keras_transformer.pretrained.family import find_family, find_task, for_task
from keras_transformer.pretrained.fields import Fields
from keras_transformer.pretrained.weights import Stored, inside, match

COMMON_BUFFERS = (r".*\.position_ids", r".*rotary_emb\.(original_)?inv_freq")


def load(directory, task=None, dtype=None, allow_pickle=False, labels=None):
    """Loads a checkpoint in the Hugging Face layout as a functional model of this library's blocks.

    The model is an ordinary `keras.Model`: train it with `fit`, generate with `kt.generation.Generator`, take it
    apart, save it as `.keras`. Every field of the configuration is used, known not to matter, or refused; a field that
    nobody knows is warned of. The weights are read from the mapped file straight into the model's variables, which are
    never initialized otherwise.

    Inputs are `token_ids` and `padding_mask` [B, T] (1 = real), for BERT also `segment_ids`; models with a head return
    `logits` as one tensor, others a dict with `hidden_states` [B, T, dim] and, where there is a pooler, `pooled`.
    Encoder-decoder models take `source_ids` and `source_padding_mask` [B, S] and `target_ids` [B, T]; without a head
    they return the encoder's result as `context` [B, S, dim] beside the decoder's `hidden_states`. Whisper takes
    `features` [B, frames, mels] in place of the source, of just as many frames as it has positions for.

    Models of images take `images` [B, height, width, channels], of the size in the configuration and already
    normalized. CLIP's models return `image_embedding` [images, dim] and `text_embedding` [texts, dim] as `transformers`
    does: of unit length, beside `logits_per_image` [images, texts], where both are in the model, and just projected
    where one is.

    Args:
        directory: path of a directory with `config.json` and the weights.
        task: str. `"bare"`, `"causal_lm"`, `"masked_lm"`, `"seq2seq"`, `"sequence_classification"`,
            `"token_classification"`, `"question_answering"`, `"image_classification"`, for DeiT also
            `"distilled_image_classification"`, for an encoder of CLIP also `"projection"`; by default what the
            configuration's `architectures` say. `"bare"` leaves the head of a checkpoint away, for a new one.
        dtype: str or `keras.DTypePolicy`. Of the model; by default the global policy.
        allow_pickle: boolean. Whether weights may be read from pickle files, with torch's `weights_only`.
        labels: strings. Names of the classes of a new head, whose weights are initialized instead of read; so is the
            pooler before it, if the file has none. For a task that classifies.

    Returns:
        `keras.Model`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the family or architecture is unknown, a field has a value that is not supported, a file is
            damaged, or tensors are missing, unknown to the family or of the wrong shape: all of them are listed.

    Example:

    >>> import json, numpy as np, keras_transformer as kt
    >>> from keras_transformer.pretrained.checkpoint import write_checkpoint
    >>> configuration = {"model_type": "gpt2", "architectures": ["GPT2Model"], "vocab_size": 9, "n_embd": 4,
    ...                  "n_layer": 0, "n_head": 2, "n_positions": 8}
    >>> shapes = {"wte.weight": (9, 4), "wpe.weight": (8, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    >>> tensors = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
    >>> write_checkpoint("tiny", configuration, tensors)
    >>> model = kt.pretrained.load("tiny")
    >>> ids = np.array([[3, 1, 4]])
    >>> tuple(model({"token_ids": ids, "padding_mask": np.ones_like(ids)})["hidden_states"].shape)
    (1, 3, 4)
    """
    configuration = read_json(directory, "config.json")
    family = find_family(configuration)
    configuration = configuration if task is None else for_task(family, configuration, task)
    task = find_task(family, configuration)
    configuration = configuration if labels is None else _with_labels(configuration, task, labels)
    checkpoint = Checkpoint(directory, allow_pickle)
    checkpoint = checkpoint if family.unpack is None else family.unpack(checkpoint)
    names = {_plain(name, family): name for name in checkpoint}
    fields = Fields(configuration, configuration["model_type"])
    with _dtype_policy(dtype), _without_values():
        model = family.build(fields, task, set(names))
        # Inputs go by name, in a call as in an exported signature.
        model = keras.Model({x.name: x for x in model.inputs}, model.output, name=model.name)
        fields.warn_of_unknown()
        places = _places(model, family)
        places = places if labels is None else _without_head(places, family, names)
        _take_from_tied(names, family, places)
        _check(model, places, checkpoint, names, family)
        _check_tied(checkpoint, names, family, places)
    for variable, stored in places.values():
        _fill(variable, stored, checkpoint, names)
    for variable in model.variables:
        if variable._value is None:
            variable._deferred_initialize()
    # What is saved is not packed, however it was stored.
    model.checkpoint_configuration = {n: value for n, value in configuration.items() if n != "quantization_config"}
    unused = {name: own for name, own in names.items() if _is_unused(name, family)}
    model.checkpoint_rest = Rest(checkpoint if unused else None, unused, _generation_settings(directory))
    return model


def _with_labels(configuration, task, labels):
    """The configuration of a model that tells these classes apart."""
    names = list(labels)
    if not task.endswith("classification"):
        raise ValueError(f"`labels` are for a `task` that classifies; received labels={names} for the task {task!r}.")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"`labels` must be two names or more, each of them once; received {names}.")
    numbered = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    others = {name: value for name, value in configuration.items() if name not in ("num_labels", "_num_labels")}
    return {**others, **numbered, "problem_type": "single_label_classification"}


def _without_head(places, family, names):
    """The places of what is read where the head is new: of the pooler before it, only if the file has one."""
    kept = {}
    for path, (variable, stored) in places.items():
        layer = path.rpartition("/")[0]
        if layer not in family.heads and (layer != "pooler" or stored.name + ".weight" in names):
            kept[path] = variable, stored
    return kept


class Rest:
    """What `save` writes and the model does not hold.

    Args:
        checkpoint: `Checkpoint`. Its tensors are left in the mapped file until they are saved.
        unused: dict from names without the prefix to those in the file, of tensors that no output depends on.
        files: dict from names of further files to their JSON.
    """

    def __init__(self, checkpoint, unused, files):
        self.checkpoint = checkpoint
        self.unused = unused
        self.files = files

    def tensors(self, prefix, dtype):
        return {prefix + name: np.asarray(self.checkpoint[own]).astype(dtype) for name, own in self.unused.items()}


def _generation_settings(directory):
    name = "generation_config.json"
    return {name: read_json(directory, name)} if (Path(directory) / name).exists() else {}


def _is_unused(name, family):
    return any(re.fullmatch(pattern, name) for pattern in family.unused)


def save(model, directory, configuration=None):
    """Writes a model as a checkpoint directory that `transformers` reads, with its `generation_config.json`.

    Args:
        model: a model that `load` returned, before or after training, or one of the same layers and names.
        directory: path of the directory: new, or with an earlier save of the same model.
        configuration: dict that `config.json` is to hold. By default the one that the model was loaded with, which a
            model reloaded from a `.keras` file no longer knows.

    Raises:
        ValueError: if the configuration is not known, does not describe the model, or `directory` holds another model.

    Example:

    >>> import keras_transformer as kt
    >>> kt.pretrained.save(keras.Sequential([keras.layers.Dense(1)]), "elsewhere")
    Traceback (most recent call last):
    ...
    ValueError: `configuration` must be given for a model that `load` did not return: ...
    """
    configuration = configuration or getattr(model, "checkpoint_configuration", None)
    if configuration is None:
        raise ValueError(
            "`configuration` must be given for a model that `load` did not return: the dict of a config.json."
        )
    configuration = _plain_json(configuration)
    family = find_family(configuration)
    task = find_task(family, configuration)
    prefix = "" if task == "bare" else family.prefix
    tensors = whole_tensors(_places(model, family, prefix))
    rest = getattr(model, "checkpoint_rest", None)
    if rest is not None:
        tensors = {**rest.tensors(prefix, next(iter(tensors.values())).dtype), **tensors}
    kind = keras.backend.standardize_dtype(model.weights[0].dtype)
    configuration = {**configuration, "torch_dtype" if "torch_dtype" in configuration else "dtype": kind}
    write_checkpoint(directory, configuration, tensors, {} if rest is None else rest.files)


def whole_tensors(places):
    """The tensors of a file, by name, from what `places` says of each variable."""
    tensors, partial = {}, {}
    for variable, stored in places.values():
        values = stored.to_file(keras.ops.convert_to_numpy(variable), variable.name)
        for name, value in zip(stored.tensor_names(variable.name, tuple(variable.shape)), values, strict=True):
            if stored.part is None:
                tensors[name] = np.asarray(stored.shaped(value), order="C")
            else:
                partial.setdefault(name, (stored, {}))[1][stored.part[0]] = value
    for name, (stored, parts) in partial.items():
        tensors[name] = stored.whole([parts[index] for index in sorted(parts)])
    return tensors


def _plain(name, family):
    """The name of a tensor without the prefix, in today's spelling."""
    name = name.removeprefix(family.prefix)
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def _places(model, family, prefix=""):
    """For each weight of the model, by its path: the variable, and how it stands in a file with this prefix."""
    variables = {variable.path: variable for variable in model.weights}
    try:
        entries = match(sorted(variables), {**inside(prefix, family.weights), **family.heads})
    except KeyError as error:
        raise ValueError(
            f"`model` must have the weights of a checkpoint of its family and no others; received one with {error}. "
            "What was added by LoRA or quantization has no place there."
        ) from None
    return {path: (variable, entries[path]) for path, variable in variables.items()}


def _check(model, places, checkpoint, names, family):
    """Lists all tensors that are missing, unknown or of the wrong shape."""
    problems, expected = [], _used(places)
    for variable, stored in places.values():
        wanted = stored.file_shape(tuple(variable.shape), variable.name)
        for name in stored.tensor_names(variable.name, tuple(variable.shape)):
            if name not in names:
                problems.append(f"missing: {name} {wanted or tuple(variable.shape)}")
                continue
            shape, ours = checkpoint.shape(names[name]), tuple(variable.shape)
            same_size = wanted is None and np.prod(shape) == np.prod(ours)
            if not same_size and shape != wanted:
                problems.append(f"wrong shape: {names[name]} {shape}, where {wanted or ours} is expected")
    tied = {_plain(name, family) for name in family.tied}
    buffers = [re.compile(pattern) for pattern in (*COMMON_BUFFERS, *family.buffers)]
    others = [name for name in names if name not in expected | tied and not any(x.fullmatch(name) for x in buffers)]
    others = [name for name in others if not _is_unused(name, family)]
    entries = [Stored(x) if isinstance(x, str) else x for x in {**family.weights, **family.heads}.values()]
    # A block that is one too many belongs to no task: the configuration says how many there are.
    known = {x.name for x in entries if "{" not in x.name}
    of_other_tasks = [name for name in others if name in known or name.rpartition(".")[0] in known]
    unknown = [name for name in others if name not in of_other_tasks]
    problems.extend(f"unexpected: {names[name]} {checkpoint.shape(names[name])}" for name in sorted(unknown))
    if problems:
        raise ValueError(
            f"The weights in {checkpoint.directory} do not fit its configuration:\n  " + "\n  ".join(sorted(problems))
        )
    if of_other_tasks:
        warnings.warn(
            f"These weights in {checkpoint.directory} belong to no part of the model as it is loaded, and are left "
            f"away: {sorted(of_other_tasks)}.",
            stacklevel=3,
        )


def _used(places):
    return {name for x, stored in places.values() for name in stored.tensor_names(x.name, tuple(x.shape))}


def _take_from_tied(names, family, places):
    """Where tied tensors stand in the file once, that may be under another of their names."""
    used = _used(places)
    for name, other in family.tied.items():
        plain, target = _plain(name, family), _plain(other, family)
        if target in used and target not in names and plain in names and plain not in used:
            names[target] = names[plain]


def _check_tied(checkpoint, names, family, places):
    """A tensor that the configuration ties to another may stand in the file as well, if it says the same."""
    used = _used(places)
    for name, other in family.tied.items():
        plain, target = _plain(name, family), _plain(other, family)
        if plain in names and plain not in used and target in names:
            if not np.array_equal(checkpoint[names[plain]], checkpoint[names[target]]):
                raise ValueError(
                    f"`tie_word_embeddings` says that {name} is {other}, but they differ in {checkpoint.directory}. "
                    "Correct the configuration."
                )


def _fill(variable, stored, checkpoint, names):
    shape = tuple(variable.shape)
    own = [names[name] for name in stored.tensor_names(variable.name, shape)]
    value = stored.to_ours([checkpoint[name] for name in own], shape, variable.name)
    if not np.isfinite(value).all():
        warnings.warn(f"{own[0]} in {checkpoint.directory} has values that are not finite.", stacklevel=3)
    variable._initializer = lambda shape, dtype=None: keras.ops.convert_to_tensor(value, dtype)
    variable._deferred_initialize()


@contextlib.contextmanager
def _dtype_policy(dtype):
    before = keras.config.dtype_policy()
    try:
        if dtype is not None:
            keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def _without_values():
    """Variables made here have a shape and no value, which they get from the file.

    Keras collects them, to be initialized when its scope ends: what was collected here is taken out again.
    """
    state = keras.src.backend.common.global_state
    waiting = list(state.get_global_attribute("uninitialized_variables", []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        state.set_global_attribute("uninitialized_variables", waiting)


def _plain_json(value):
    """Dicts and lists as they were before Keras tracked them."""
    if isinstance(value, dict):
        return {name: _plain_json(part) for name, part in value.items()}
    return [_plain_json(part) for part in value] if isinstance(value, list | tuple) else value
