"""Checkpoint directories in the Hugging Face layout: a configuration in JSON beside tensors under their names.

No code from a checkpoint runs, no tensor is read before everything around it has been checked, and what is written
takes its place whole or not at all. Which tensors a model has is not known here.

Reference: https://huggingface.co/docs/transformers/main_classes/model (`save_pretrained`)
"""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath

from keras_transformer.pretrained.replacement import Replacement
from keras_transformer.pretrained.safetensors_file import (
    CODES,
    Tensor,
    describe,
    numpy_dtype,
    open_tensors,
    parse_json,
    spool,
    write_tensors,
)

CONFIGURATION = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
SHARDS = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def read_json(directory, name):
    """Reads one of the JSON files of a checkpoint, such as `config.json` or `generation_config.json`.

    Args:
        directory: Path of the checkpoint directory.
        name: String. Name of a file in the directory; see `Checkpoint` for where links may lead.

    Returns:
        A dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a JSON object in UTF-8 with each key once, or lies outside the directory.

    Example:

    >>> write_checkpoint("tiny", {"model_type": "tiny"}, {})
    >>> read_json("tiny", "config.json")
    {'model_type': 'tiny'}
    """
    path = _member(Path(directory), name)
    return parse_json(path.read_bytes(), str(path))


class Checkpoint(Mapping):
    """The tensors of a checkpoint directory: a read-only mapping from names to NumPy arrays.

    The tensors are those of `model.safetensors` or else those that `model.safetensors.index.json` finds in its
    shards. Opening checks the headers of all files and reads no tensor. An array is a read-only view of the
    memory-mapped file: reading copies nothing, and the system takes back the pages of arrays that are no longer used.
    The file must not be cut short meanwhile; `write_checkpoint` may replace it, for it never writes into a file in use.

    A file of the checkpoint may be a link to a file in the same directory or, if the directory is a snapshot in a
    hub cache (`.../snapshots/<revision>`), to one in the `blobs` folder beside `snapshots`. Links that lead elsewhere
    are refused.

    A checkpoint need not be closed: a map lives as long as an array or the checkpoint uses it. A `with` block ends
    the reading, not the arrays.

    Args:
        directory: Path of the checkpoint directory.
        allow_pickle: Boolean. Whether a directory without safetensors may be read from `pytorch_model.bin`, its index
            or a single `*.pt` file. These are pickles; PyTorch, which must be installed, reads them without running
            the code in them (`weights_only=True`).

    Raises:
        FileNotFoundError: If the directory holds no weights, or the index names a shard that is not there.
        ValueError: If a file is damaged or lies outside the directory, a shard lacks a tensor that the index promises,
            or the weights are pickles and `allow_pickle` is not set. Everything is found on opening.

    Reference: https://huggingface.co/docs/safetensors (the format)

    Example:

    >>> write_checkpoint("tiny", {"model_type": "tiny"}, {"table": np.ones((4, 2), "float32")})
    >>> with Checkpoint("tiny") as checkpoint:
    ...     print(checkpoint.names(), checkpoint.shape("table"), checkpoint.dtype("table"))
    ...     table = checkpoint.read("table")
    ('table',) (4, 2) float32
    >>> table.sum()
    np.float32(8.0)
    """

    def __init__(self, directory, allow_pickle=False):
        self.directory = Path(directory)
        self._tensors = _open(self.directory, allow_pickle)

    def names(self):
        """The names of the tensors, as a tuple in the order of the file or the index."""
        return tuple(self)

    def shape(self, name):
        """The shape of a tensor, as a tuple of integers."""
        return self._tensor(name).shape

    def dtype(self, name):
        """The dtype of a tensor by its NumPy or ml_dtypes name, such as `"bfloat16"`."""
        return self._tensor(name).dtype

    def read(self, name):
        """The array of a tensor: a read-only view of the file, whose pages are read when they are used."""
        array = self._tensor(name).load()
        array.flags.writeable = False
        return array

    def close(self):
        """Ends the reading. Arrays read before stay valid."""
        self._tensors = None

    def _tensor(self, name):
        if self._tensors is None:
            raise ValueError(f"The checkpoint {self.directory} is closed.")
        if name not in self._tensors:
            raise KeyError(f"`name` must be one of the {len(self)} tensors of {self.directory}; received {name!r}.")
        return self._tensors[name]

    __getitem__ = read

    def __contains__(self, name):
        return name in (self._tensors or {})

    def __iter__(self):
        return iter(self._tensors or {})

    def __len__(self):
        return len(self._tensors or {})

    # `Mapping` would compare two checkpoints by reading and comparing all of their arrays.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def __repr__(self):
        return f"<Checkpoint {str(self.directory)!r} with {len(self)} tensors>"


def _member(directory, name):
    """The path of the file called `name` in `directory`, known to exist and not to lead out of the checkpoint."""
    # A Windows path knows both separators and the drive letters.
    if not name or name in (".", "..") or "\0" in name or PureWindowsPath(name).name != name:
        raise ValueError(f"A file of the checkpoint {directory} must be a plain name in it; received {name!r}.")
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of the checkpoint; there is none.")
    target, home = path.resolve(), directory.resolve()
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (home, *blobs)):
        raise ValueError(
            f"{path} must stay within its directory, or in a hub cache within `blobs`; it leads to {target}."
        )
    return path


def _open(directory, allow_pickle):
    """The tensors of whatever weights the directory has; safetensors go before pickles, one file before shards."""
    if not directory.is_dir():
        raise FileNotFoundError(f"`directory` must be a checkpoint directory; received {str(directory)!r}.")
    present = {path.name for path in directory.iterdir()}
    if WEIGHTS in present:
        return open_tensors(_member(directory, WEIGHTS))
    if INDEX in present:
        return _open_shards(directory, INDEX, open_tensors)
    torch_files = sorted(name for name in present if name.endswith(".pt"))
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if name in present][:1] or torch_files
    if not pickles:
        raise FileNotFoundError(f"{directory} must hold {WEIGHTS} or {INDEX}; it has {sorted(present)}.")
    if not allow_pickle:
        raise ValueError(
            f"{directory} must hold its weights as {WEIGHTS}; it has a pickle, {pickles[0]}. If you trust where it "
            "comes from, open it with `allow_pickle=True`, which reads it through `torch.load(weights_only=True)`, or "
            "convert it for good with `write_checkpoint(directory, read_json(directory, 'config.json'), "
            "Checkpoint(directory, allow_pickle=True))`."
        )
    if len(pickles) > 1:
        raise ValueError(f"{directory} must hold one file of weights; it has {pickles}.")
    if pickles[0] == PICKLE_INDEX:
        return _open_shards(directory, PICKLE_INDEX, _open_pickle)
    return _open_pickle(_member(directory, pickles[0]))


def _open_shards(directory, index_name, open_file):
    """The tensors that an index promises, each from the shard it names; what else a shard holds is left alone."""
    index = read_json(directory, index_name)
    where = directory / index_name
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{where} must have a `weight_map` from names of tensors to names of files.")
    shards = {}
    for shard in dict.fromkeys(weight_map.values()):
        try:
            shards[shard] = open_file(_member(directory, shard))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{where} names the shard {shard!r}, which cannot be opened: {error}") from error
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ValueError(f"{directory / shard} must hold the tensor {name!r} that {where} promises; it does not.")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_pickle(path):
    """The tensors of a file written by `torch.save`, without running what else the pickle asks for."""
    import torch

    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # PyTorch and zipfile raise many kinds, and none of them names the file.
        raise ValueError(
            f"{path} must be tensors alone, as `torch.save` writes them; it cannot be read: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict from names to tensors; it holds a {type(content).__name__}.")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"{path} must map names to dense tensors; received {type(tensor).__name__} under the key {name!r}."
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in CODES:
            raise ValueError(
                f"The tensor {name!r} of {path} must have one of the dtypes {list(CODES)}; it has {dtype}."
            )
        tensors[name] = Tensor(dtype, tuple(tensor.shape), partial(_as_array, tensor.detach(), dtype))
    return tensors


def _as_array(tensor, dtype):
    import torch

    # PyTorch hands NumPy only the dtypes that NumPy has itself: the others go as integers of the same width.
    width = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size())
    if numpy_dtype(dtype).isbuiltin == 1 or width is None:
        return tensor.numpy()
    return tensor.view(width).numpy().view(numpy_dtype(dtype))


def write_checkpoint(directory, configuration, tensors, files=None, shard_bytes=5 * 2**30):
    """Writes a checkpoint directory: `config.json`, the tensors as safetensors, and further JSON files.

    Tensors that take more than `shard_bytes` together are written as `model-00001-of-00002.safetensors`, ... with an
    index. What comes one at a time is held one at a time: the arrays of an iterable go through an unnamed file in the
    directory, which takes their size once more on the disk and the time to write it; those of a mapping are asked for
    twice, for their shapes and for their bytes, and go straight to their place. An array that is not C-contiguous is
    copied while it is written.

    All files are written under temporary names. Then the old ones step aside, the new ones take their names,
    `config.json` last, and the old ones go, shards that the new checkpoint does not have included. An exception
    leaves the directory as it was. A process killed while files are being renamed leaves a directory without
    `config.json`, never a complete one with the weights of two saves.

    A directory that already holds a model is written to only if it is the same model, as `model_type` and
    `architectures` tell. Files of other names stay.

    Args:
        directory: Path of the checkpoint directory, made if it is not there.
        configuration: Dict, what `config.json` is to hold.
        tensors: Mapping from names to arrays, or iterable of pairs of a name and an array, as NumPy arrays or what
            `np.asarray` takes. The dtypes of ml_dtypes, such as bfloat16, are stored as they are.
        files: Dict from names of further files, such as `generation_config.json`, to what JSON they are to hold.
        shard_bytes: Integer. The most bytes of tensors in one file. A tensor larger than that has a file to itself.

    Raises:
        ValueError: If the directory holds another model or weights of no known model; if a name comes twice or is not
            a string, or a dtype cannot be stored; if a name in `files` is no plain `*.json`, or is one that is
            written anyway; if `shard_bytes` is not a positive integer.

    Example:

    >>> parts = ((f"layer.{index}", np.full(1000, index, "float32")) for index in range(3))
    >>> write_checkpoint("sharded", {"model_type": "tiny"}, parts, shard_bytes=8000)
    >>> import os
    >>> for name in sorted(os.listdir("sharded")):
    ...     print(name)
    config.json
    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json
    >>> Checkpoint("sharded").read("layer.2")[0]
    np.float32(2.0)
    """
    directory = Path(directory)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"`shard_bytes` must be a positive integer; received {shard_bytes!r}.")
    documents = dict(files or {})
    for name in documents:
        if PureWindowsPath(name).name != name or not name.endswith(".json") or name in (CONFIGURATION, INDEX):
            raise ValueError(f"`files` must have plain names of further JSON files; received {name!r}.")
    documents[CONFIGURATION] = configuration
    # Encoded before anything is touched, and the configuration takes its name after everything else.
    encoded = {name: json.dumps(content, indent=2, sort_keys=True) + "\n" for name, content in documents.items()}
    _check_same_model(directory, configuration)
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    present = [path.name for path in directory.iterdir()]
    try:
        with Replacement(directory, last=CONFIGURATION) as replacement:
            replacement.remove(name for name in present if _is_written_here(name))
            _write_tensors(replacement, tensors, shard_bytes)
            for name, text in encoded.items():
                with replacement.create(name) as file:
                    file.write(text.encode("utf-8"))
    except BaseException:
        if is_new:
            directory.rmdir()
        raise


def _is_written_here(name):
    return name in (WEIGHTS, INDEX) or SHARDS.fullmatch(name) is not None


def _check_same_model(directory, configuration):
    present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if CONFIGURATION in present:
        held = read_json(directory, CONFIGURATION)
        for key in ("model_type", "architectures"):
            if held.get(key) != configuration.get(key):
                raise ValueError(
                    f"`directory` must be empty or hold the model that is written, with the {key} "
                    f"{configuration.get(key)!r}; {directory / CONFIGURATION} has {held.get(key)!r}."
                )
    else:
        weights = [name for name in present if _is_written_here(name) or name in (PICKLE, PICKLE_INDEX)]
        if weights:
            raise ValueError(
                f"`directory` must be empty or hold the model that is written; {directory} has weights, {weights[0]}, "
                f"and no {CONFIGURATION} to say of which model."
            )


def _write_tensors(replacement, tensors, shard_bytes):
    """Writes the tensors into one file, or into shards and the index that finds them."""
    if not isinstance(tensors, Mapping):
        tensors = spool(tensors, replacement.directory)
    shards, room, total = [{}], shard_bytes, 0
    for name, (dtype, shape) in describe(tensors).items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = dtype, shape
        room -= size
        total += size
    if len(shards) == 1:
        with replacement.create(WEIGHTS) as file:
            write_tensors(file, tensors, shards[0])
        return
    weight_map = {}
    for number, kinds in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with replacement.create(shard) as file:
            write_tensors(file, tensors, kinds)
        weight_map.update(dict.fromkeys(kinds, shard))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with replacement.create(INDEX) as file:
        file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8"))
