"""One safetensors file: a header checked in full before it is believed, arrays that are views of the file, streaming.

The `safetensors` library is not used: its arrays for NumPy are copies, it gives none in float8, and to write a file it
must have all tensors in memory. What it checks on opening is checked here.

Reference: https://huggingface.co/docs/safetensors (the format)
"""

import json
import math
import mmap
import os
import struct
import tempfile
from collections import Counter
from functools import partial
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 100_000_000  # The limit of the reference implementation.
MAX_DIMENSIONS = 32

# The four- and six-bit formats are missing: NumPy has no array whose elements share a byte.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
CODES = {name: code for code, name in DTYPES.items()}


class Tensor(NamedTuple):
    """What is known of a stored tensor before it is read, and `load`, which gives its array."""

    dtype: str
    shape: tuple
    load: Any


def numpy_dtype(name):
    """The dtype called `name`: NumPy's own, or one of those that ml_dtypes adds to it."""
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def parse_json(text, description):
    """The object in `text`, bytes of UTF-8, in which no key may stand twice.

    Args:
        text: Bytes.
        description: String. What error messages call the text, its file included.

    Returns:
        A dict.

    Raises:
        ValueError: If the bytes are not UTF-8, not JSON, not an object, or name a key twice.

    Example:

    >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
    Traceback (most recent call last):
    ValueError: config.json must name each key once; it repeats 'a'.
    """

    repeated = []

    def note_repeats(pairs):
        repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=note_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{description} must be JSON in UTF-8; it cannot be decoded: {error}.") from error
    if repeated:
        raise ValueError(f"{description} must name each key once; it repeats {repeated[0]!r}.")
    if not isinstance(content, dict):
        raise ValueError(f"{description} must be a JSON object; it is a {type(content).__name__}.")
    return content


def open_tensors(path):
    """Maps a safetensors file into memory and checks all of its header; no tensor is read.

    Args:
        path: `pathlib.Path` of the file.

    Returns:
        A dict from each name to its `Tensor`. The arrays that `load` gives are read-only views of the map, which
        lasts as long as any of them.

    Raises:
        ValueError: If the file is cut short or longer than its header says, or its header is not what the format
            demands. The message names the file and the tensor.

    Example:

    >>> import pathlib
    >>> with open("one.safetensors", "wb") as file:
    ...     ones = {"ones": np.ones((2, 3), "float16")}
    ...     write_tensors(file, ones, describe(ones))
    >>> open_tensors(pathlib.Path("one.safetensors"))["ones"].load().sum()
    np.float16(6.0)
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path} must begin with 8 bytes for the length of its header; it has {size} bytes.")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} must hold its header whole, in at most {MAX_HEADER_BYTES} bytes; it claims a header of "
                f"{length} bytes in a file of {size}. The file is cut short or no safetensors file."
            )
        header = parse_json(file.read(length), f"The header of {path}")
        entries = _check_header(header, size - 8 - length, path)
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return {
        name: Tensor(dtype, shape, partial(np.ndarray, shape, numpy_dtype(dtype), mapped, 8 + length + begin))
        for name, (dtype, shape, begin) in entries.items()
    }


def _check_header(header, body_bytes, path):
    """The dtype, shape and first byte of each tensor, once all of them are known to tile the body without a gap."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"`__metadata__` in the header of {path} must map strings to strings; received {short(metadata)}."
        )
    entries, extents = {}, []
    for name, entry in header.items():
        where = f"The tensor {name!r} of {path}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"{where} must have `dtype`, `shape` and `data_offsets`; received {short(entry)}.")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{where} must have one of the dtypes {', '.join(DTYPES)}; received {short(code)}.")
        if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{where} must have a shape of at most {MAX_DIMENSIONS} sizes; received {short(shape)}.")
        if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= body_bytes:
            raise ValueError(
                f"{where} must lie within the {body_bytes} bytes after the header; received the offsets "
                f"{short(offsets)}. The file is cut short, or its header was changed."
            )
        begin, end = offsets
        expected = math.prod(shape) * numpy_dtype(DTYPES[code]).itemsize
        if expected != end - begin:
            raise ValueError(f"{where}, {code} of shape {shape}, must take {expected} bytes; it has {end - begin}.")
        # An empty tensor may claim sizes beside the zero that no array can have.
        if math.prod(filter(None, shape)) >= 2**56:
            raise ValueError(f"{where} must have a shape that an array can have; received {shape}.")
        entries[name] = (DTYPES[code], tuple(shape), begin)
        extents.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            fault = "a hole before" if begin > position else "an overlap at"
            raise ValueError(f"The tensors of {path} must follow one another; there is {fault} {name!r}.")
        position = end
    if position != body_bytes:
        raise ValueError(
            f"{path} must end with its last tensor, {position} bytes after the header; it goes on to {body_bytes}."
        )
    return entries


def _sizes(values):
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def storable(name, value):
    """`value` as a NumPy array, known to have a name and a dtype that can be stored."""
    array = np.asarray(value)
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"`tensors` must have strings as names, other than '__metadata__'; received {name!r}.")
    if array.dtype.name not in CODES:
        raise ValueError(f"`tensors` must have dtypes among {', '.join(CODES)}; {name!r} has {array.dtype.name}.")
    return array


def spool(pairs, directory):
    """Puts arrays that come one at a time into an unnamed file, and gives them back as views of its map.

    The header of a safetensors file stands first and needs the shapes of all tensors: those of a stream are known when
    it is over, and it must not be held in memory.

    Args:
        pairs: Iterable of pairs of a name and an array.
        directory: Path of the directory whose file system takes the bytes until the last view is gone.

    Returns:
        A dict from names to read-only arrays.

    Raises:
        ValueError: If a name comes twice or is not a string, or a dtype cannot be stored.

    Example:

    >>> spool(((name, np.ones(3)) for name in "ab"), ".")["b"]
    array([1., 1., 1.])
    """
    entries, position = {}, 0
    with tempfile.TemporaryFile(dir=directory) as file:
        for name, value in pairs:
            array = storable(name, value)
            if name in entries:
                raise ValueError(f"`tensors` must have each name once; received {name!r} twice.")
            entries[name] = (array.shape, numpy_dtype(array.dtype.name), position)
            position += array.nbytes
            file.write(_flat_bytes(array))
            del value, array  # Let go before the next one is made.
        file.flush()
        mapped = mmap.mmap(file.fileno(), position, access=mmap.ACCESS_READ) if position else b""
    return {name: np.ndarray(shape, dtype, mapped, begin) for name, (shape, dtype, begin) in entries.items()}


def describe(tensors):
    """The dtype and shape of each array of a mapping, as a dict, once all of them are known to be storable.

    Raises:
        ValueError: If a name is not a string, or a dtype cannot be stored.

    Example:

    >>> describe({"a": np.zeros((4, 2))})
    {'a': (dtype('float64'), (4, 2))}
    """
    return {name: _kind(storable(name, tensors[name])) for name in tensors}


def write_tensors(file, tensors, kinds):
    """Writes a safetensors file: the header, then one tensor after the other, the wider elements first.

    That order keeps every tensor aligned, as the format allows no gaps.

    Args:
        file: Binary file open for writing.
        tensors: Mapping from names to arrays. Of one that is not C-contiguous there is a copy while it is written.
        kinds: Dict from the names of those to write to dtype and shape, as `describe` gives them.

    Raises:
        ValueError: If an array no longer has the dtype and shape that were described.

    Example:

    >>> tensors = {"a": np.zeros((4, 2)), "b": np.array(3)}
    >>> with open("two.safetensors", "wb") as file:
    ...     write_tensors(file, tensors, describe(tensors))
    """
    # transformers refuses files that do not name the framework whose conventions they follow.
    header, position = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)
    for name in ordered:
        dtype, shape = kinds[name]
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype.name], "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in ordered:
        array = storable(name, tensors[name])
        if _kind(array) != kinds[name]:
            raise ValueError(f"`tensors` must not change while it is written; {name!r} has another dtype or shape.")
        file.write(_flat_bytes(array))
        del array


def _kind(array):
    return numpy_dtype(array.dtype.name), array.shape


def _flat_bytes(array):
    # Buffers do not know the dtypes of ml_dtypes, and `ascontiguousarray` gives a scalar an axis: hence flat bytes.
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
