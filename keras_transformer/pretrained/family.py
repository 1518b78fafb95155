"""What a family of checkpoints is: a builder, and tables of names."""

import dataclasses
import importlib
from collections.abc import Callable

# `model_type` of a configuration -> the module of the family.
FAMILIES = {
    "bart": "bart",
    "bert": "bert",
    "clip": "clip",
    "clip_text_model": "clip_text",
    "clip_vision_model": "clip_vision",
    "deit": "deit",
    "distilbert": "distilbert",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "marian": "marian",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "roberta": "roberta",
    "t5": "t5",
    "vit": "vit",
    "whisper": "whisper",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A recipe: how a configuration becomes a model, and how its weights are called in files.

    Args:
        build: function `(fields, task, stored)` that returns a functional model; `stored` is the set of the names in
            the file, without the prefix, for what only they can tell.
        tasks: dict from the architectures in configurations to tasks.
        weights: dict from patterns of layer paths to names in the file, without the prefix (see `weights.match`).
        heads: the same for what stands outside of the base model, and so never has the prefix.
        prefix: str. What precedes the names of the base model in files of models with a head.
        tied: dict from tensors that may be in a file besides the one they are tied to, to that one.
        buffers: patterns of tensors in files (without the prefix) that are computed, not trained.
        spellings: pairs of a pattern of an older spelling (without the prefix) and its replacement.
        unpack: function from the checkpoint to a mapping of floats like it, where files may pack weights.
    """

    build: Callable
    tasks: dict
    weights: dict
    heads: dict = dataclasses.field(default_factory=dict)
    prefix: str = ""
    tied: dict = dataclasses.field(default_factory=dict)
    buffers: tuple = ()
    spellings: tuple = ()
    unpack: Callable | None = None


def find_family(configuration):
    """The family of a configuration: its module's `FAMILY`, or what `family` makes where names depend on fields.

    Raises:
        ValueError: if there is none, with those that there are.
    """
    kind = configuration.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"`model_type` must be one of {sorted(FAMILIES)}; received {kind!r}.")
    module = importlib.import_module(f"keras_transformer.pretrained.families.{FAMILIES[kind]}")
    return module.FAMILY if hasattr(module, "FAMILY") else module.family(configuration)


def find_task(family, configuration):
    """The task of a checkpoint, by its `architectures`."""
    architectures = configuration.get("architectures") or []
    known = [family.tasks[name] for name in architectures if name in family.tasks]
    if not known:
        raise ValueError(
            f"`architectures` of a {configuration['model_type']} checkpoint must name one of {sorted(family.tasks)}, "
            f"or `task` be one of {sorted(set(family.tasks.values()))}; received {architectures}."
        )
    return known[0]


def for_task(family, configuration, task):
    """The configuration of the same checkpoint as a model for another task, by the architecture that has it."""
    names = [name for name, own in family.tasks.items() if own == task]
    if not names:
        raise ValueError(
            f"`task` must be one of {sorted(set(family.tasks.values()))} for a {configuration['model_type']} "
            f"checkpoint; received {task!r}."
        )
    same = set(names).intersection(configuration.get("architectures") or [])
    return configuration if same else {**configuration, "architectures": names[:1]}
