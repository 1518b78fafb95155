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
    "llava": "llava",
    "marian": "marian",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "paligemma": "paligemma",
    "qwen2": "qwen2",
    "roberta": "roberta",
    "t5": "t5",
    "vit": "vit",
    "whisper": "whisper",
}
# The same for what `register` was given: a `Family`, or a function of the configuration that returns one.
REGISTERED = {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A recipe: how a configuration becomes a model, and how its weights are called in files.

    Names in files are those of modules, whose parameters (`weight`, `bias`) follow from the layers that hold them, and
    kernels are taken for transposed, as torch's `Linear` keeps them. `exact`, `packed` and `Stored` say otherwise.

    Args:
        build: function `(fields, task, stored)` that returns a functional model. It takes what it needs from `fields`,
            a `Fields`, and names its layers; `stored` is the set of the names in the file, without the prefix, for
            what only they can tell.
        tasks: dict from the architectures in configurations to tasks.
        weights: dict from patterns of layer paths to names in the file, without the prefix. `{i}` and `{j}` stand for
            numbers, in both; a pattern of the path of one variable goes where a layer's own are stored differently.
        heads: the same for what stands outside of the base model, and so never has the prefix.
        prefix: str. What precedes the names of the base model in files of models with a head.
        tied: dict from tensors that may be in a file besides the one they are tied to, to that one.
        buffers: patterns of tensors in files (without the prefix) that are computed, not trained.
        spellings: pairs of a pattern of an older spelling (without the prefix) and its replacement.
        unpack: function from the checkpoint to a mapping of floats like it, where files may pack weights.
        unused: patterns of tensors in files (without the prefix) that no output depends on. They are in no model, but
            what `load` returns keeps them for `save`.
        language_model: function of the fields of a decoder-only family that returns a `LanguageModel`, for models in
            which it is one part.

    Example:

    >>> def build(fields, task, stored):
    ...     token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    ...     x = keras.layers.Embedding(fields.need("vocab_size"), fields.need("dim"), name="embedding")(token_ids)
    ...     for i in range(fields.need("depth")):
    ...         x = keras.layers.Dense(fields.need("dim"), "relu", name=f"hidden_{i}")(x)
    ...     return keras.Model(token_ids, {"hidden_states": x})
    >>> weights = {"embedding": "tokens", "hidden_{i}": "layers.{i}.linear"}
    >>> family = kt.pretrained.Family(build, {"RectifierModel": "bare"}, weights)
    >>> model = family.build(kt.pretrained.Fields({"vocab_size": 9, "dim": 4, "depth": 2}, "rectifier"), "bare", set())
    >>> model.output["hidden_states"].shape
    (None, None, 4)
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
    unused: tuple = ()
    language_model: Callable | None = None


def register(model_type, family):
    """Makes one more family known to `load`, to `save`, and to all that stands on them.

    Args:
        model_type: str. What `config.json` of its checkpoints has under this name.
        family: `Family`; or, where names in files depend on the configuration, a function from `config.json` as a dict
            to one.

    Raises:
        ValueError: if there is a family of this name already, or an argument is of another kind.

    Example:

    >>> def build(fields, task, stored):
    ...     token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    ...     x = keras.layers.Embedding(fields.need("vocab_size"), fields.need("dim"), name="embedding")(token_ids)
    ...     return keras.Model(token_ids, {"hidden_states": x})
    >>> family = kt.pretrained.Family(build, {"WordVectors": "bare"}, {"embedding": "vectors"})
    >>> kt.pretrained.register("word_vectors", family)
    >>> configuration = {"model_type": "word_vectors", "architectures": ["WordVectors"], "vocab_size": 9, "dim": 4}
    >>> token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    >>> vectors = keras.layers.Embedding(9, 4, name="embedding")(token_ids)
    >>> kt.pretrained.save(keras.Model(token_ids, vectors), "vectors", configuration)
    >>> kt.pretrained.load("vectors").output["hidden_states"].shape
    (None, None, 4)
    """
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"`model_type` must be a name, as in `config.json`; received {model_type!r}.")
    if model_type in FAMILIES or model_type in REGISTERED:
        raise ValueError(f"`model_type` must be one that has no family yet; received {model_type!r}.")
    if not isinstance(family, Family) and not callable(family):
        raise ValueError(
            f"`family` must be a `Family`, or a function from a configuration to one; received {family!r}."
        )
    REGISTERED[model_type] = family


def find_family(configuration):
    """The family of a configuration: its module's `FAMILY`, or what `family` makes where names depend on fields.

    Raises:
        ValueError: if there is none, with those that there are.
    """
    kind = configuration.get("model_type")
    if kind in REGISTERED:
        family = REGISTERED[kind]
    elif kind in FAMILIES:
        module = importlib.import_module(f"keras_transformer.pretrained.families.{FAMILIES[kind]}")
        family = module.FAMILY if hasattr(module, "FAMILY") else module.family
    else:
        raise ValueError(
            f"`model_type` must be one of {sorted({*FAMILIES, *REGISTERED})}; received {kind!r}. Another family can be "
            "added with `kt.pretrained.register`."
        )
    return family if isinstance(family, Family) else family(configuration)


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
