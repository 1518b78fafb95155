"""How a weight of ours and a tensor of a file correspond: names, packing, orientation."""

import dataclasses
import re

import numpy as np

# The name of a variable of a Keras layer -> that of a parameter of a torch module.
PARAMETERS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
    "embeddings": "weight",
    "position_table": "weight",
    "bias_table": "weight",
    "up": "weight",
    "gate": "weight",
    "down": "weight",
    "up_bias": "bias",
    "gate_bias": "bias",
    "down_bias": "bias",
}
KERNELS = ("kernel", "up", "gate", "down")


@dataclasses.dataclass(frozen=True)
class Stored:
    """How the weights of one of our layers stand in a file.

    Args:
        name: str. Name of the module, as in the file; `{i}` stands for a number, as in our path. With `{expert}` it
            stands for one module after the other, which are stacked along the first axis of ours.
        exact: boolean. Whether `name` is that of a tensor, not of a module with a weight and a bias.
        transposed: boolean. Whether a kernel stands as (out, in), as in torch's `Linear`.
        part: None, or which one of how many parts along which axis of the tensor: (index, count, axis). Parts are
            equal, or `count` is a tuple of their shares.
        interleaved: boolean. Whether the parts take turns, and do not follow each other.
        offset: float. What our values have more than the file's.
        shape: None, or that of an exact tensor that has another shape than ours, with -1 for a size that follows and
            `...` for all sizes of ours.

    Example:

    >>> norm = kt.pretrained.Stored("layers.0.input_layernorm", offset=1.0)  # Gemma's: the file has 0 for our 1.
    >>> norm.to_ours([np.zeros(3, "float32")], (3,), "scale").tolist()
    [1.0, 1.0, 1.0]
    """

    name: str
    exact: bool = False
    transposed: bool = True
    part: tuple | None = None
    interleaved: bool = False
    offset: float = 0.0
    shape: tuple | None = None

    @property
    def stacked(self):
        return "{expert}" in self.name

    def tensor_names(self, variable, shape):
        """Names of the tensors that hold a variable of `shape`: one for each expert, or a single one."""
        name = self.name if self.exact else f"{self.name}.{PARAMETERS[variable]}"
        return [name.format(expert=i) for i in range(shape[0])] if self.stacked else [name]

    def file_shape(self, shape, variable):
        """Shape of each tensor for a variable of `shape`; None where any with as many numbers will do."""
        if self.shape is not None:
            return None
        shape = shape[1:] if self.stacked else shape
        shape = self._turned(np.empty(shape, "bool"), variable).shape
        if self.part is not None:
            index, shares, axis = self.part
            axis %= len(shape)
            whole = shape[axis] * shares if isinstance(shares, int) else shape[axis] * sum(shares) // shares[index]
            shape = (*shape[:axis], whole, *shape[axis + 1 :])
        return shape

    def to_ours(self, tensors, shape, variable):
        """What the variable is to hold, of `shape`, from the tensors of the file."""
        if self.stacked:
            return np.stack([self._to_ours(tensor, shape[1:], variable) for tensor in tensors])
        return self._to_ours(tensors[0], shape, variable)

    def _to_ours(self, tensor, shape, variable):
        if self.part is not None:
            index, count, axis = self.part
            if self.interleaved:
                tensor = np.moveaxis(np.moveaxis(tensor, axis, 0)[index::count], 0, axis)
            else:
                tensor = np.split(tensor, _bounds(count, tensor.shape[axis]), axis)[index]
        tensor = self._turned(tensor, variable, back=True)
        if self.shape is not None:
            tensor = tensor.reshape(shape)
        return tensor + np.asarray(self.offset, tensor.dtype) if self.offset else tensor

    def to_file(self, value, variable):
        """The tensors of the file, or the parts of them, that hold `value`, in the order of their names."""
        value = value - np.asarray(self.offset, value.dtype) if self.offset else value
        return [self._turned(each, variable) for each in (value if self.stacked else [value])]

    def whole(self, parts):
        """The tensor that has these parts, in their order."""
        axis = self.part[2]
        if not self.interleaved:
            return np.concatenate(parts, axis)
        axis %= parts[0].ndim
        shape = parts[0].shape
        return np.stack(parts, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def shaped(self, value):
        """A tensor of the file in its shape there."""
        if self.shape is None:
            return value
        return value.reshape([size for part in self.shape for size in (value.shape if part is ... else (part,))])

    def _turned(self, value, variable, back=False):
        """A kernel of Keras, (..., in, out), in torch's order (out, in, ...), or back."""
        if variable not in KERNELS or self.exact or not self.transposed:
            return value
        axes = range(value.ndim)
        if back:
            return value.transpose(*axes[2:], 1, 0)
        return value.transpose(axes[-1], axes[-2], *axes[:-2])


def _bounds(shares, size):
    """Where to split an axis of this size: the number of its equal parts, or where all but the first begin."""
    return shares if isinstance(shares, int) else np.cumsum(shares)[:-1] * size // sum(shares)


def packed(name, index, count=3, axis=0, transposed=True):
    """One of several projections that stand in one tensor.

    Args:
        name: str. Name of the module, as in the file.
        index: int. Which of the parts it is.
        count: int, or tuple of ints where parts differ in size: their shares.
        axis: int. Along which axis of the tensor the parts follow each other; 0 is the outputs of a torch `Linear`.
        transposed: boolean. Whether a kernel stands as (out, in), as in torch's `Linear`.

    Returns:
        `Stored`.

    Example:

    >>> key = kt.pretrained.packed("layers.0.qkv_proj", 1, count=(4, 1, 1))  # Four query heads share a key.
    >>> key.file_shape((32, 8), "kernel")
    (48, 32)
    """
    return Stored(name, part=(index, count, axis), transposed=transposed)


def exact(name, shape=None, **options):
    """A tensor by itself, of the same numbers as ours in the same order.

    Args:
        name: str. Name of the tensor, as in the file.
        shape: None, or its shape there where that differs from ours, with -1 for a size that follows and `...` for all
            sizes of ours.
        **options: other arguments of `Stored`.

    Returns:
        `Stored`.

    Example:

    >>> token = kt.pretrained.exact("embeddings.cls_token", (1, ...))
    >>> token.shaped(np.zeros((1, 32))).shape  # Ours as it stands in the file.
    (1, 1, 32)
    """
    return Stored(name, exact=True, shape=shape, **options)


def inside(prefix, table):
    """The table of a model that is one module of a larger one.

    Args:
        prefix: str. What precedes its names there, with the dot.
        table: dict, as `Family` takes one for `weights`.

    Returns:
        dict of the same patterns.

    Example:

    >>> kt.pretrained.inside("text_model.", {"text_norm": "final_layer_norm"})["text_norm"].name
    'text_model.final_layer_norm'
    """
    entries = {path: Stored(entry) if isinstance(entry, str) else entry for path, entry in table.items()}
    return {path: dataclasses.replace(entry, name=prefix + entry.name) for path, entry in entries.items()}


def match(paths, table):
    """Finds for each variable the entry of a table, with the numbers filled in.

    Args:
        paths: list of str. Paths of variables.
        table: dict from pattern to `Stored` or str; `{i}` and `{j}` stand for numbers. A pattern is one of paths of
            layers, or of variables where a layer's own are stored differently.

    Returns:
        dict from path to `Stored`.

    Raises:
        KeyError: with the path that no pattern fits: the table and the model builder of a family do not agree.
    """
    patterns = [
        (re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(pattern))), value)
        for pattern, value in table.items()
    ]
    found = {}
    for path in paths:
        layer = path.rsplit("/", 1)[0]
        fits = ((pattern.fullmatch(path) or pattern.fullmatch(layer), value) for pattern, value in patterns)
        fit, value = next(((fit, value) for fit, value in fits if fit), (None, None))
        if fit is None:
            raise KeyError(path)
        stored = Stored(value) if isinstance(value, str) else value
        if not stored.exact and path.rsplit("/", 1)[-1] not in PARAMETERS:
            raise KeyError(path)
        found[path] = dataclasses.replace(stored, name=stored.name.format(expert="{expert}", **fit.groupdict()))
    return found
