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
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """How the weights of one of our layers stand in a file.

    Args:
        name: str. Name of the module, as in the file; `{i}` stands for a number, as in our path.
        exact: boolean. Whether `name` is that of a tensor, not of a module with a weight and a bias.
        transposed: boolean. Whether a kernel stands as (out, in), as in torch's `Linear`.
        part: None, or which one of how many equal parts along which axis of the tensor: (index, count, axis).
        offset: float. What our values have more than the file's.
        shape: None, or that of an exact tensor, with -1 for a size that follows from the others.
    """

    name: str
    exact: bool = False
    transposed: bool = True
    part: tuple | None = None
    offset: float = 0.0
    shape: tuple | None = None

    def tensor_name(self, variable):
        return self.name if self.exact else f"{self.name}.{PARAMETERS[variable]}"

    def file_shape(self, shape, variable):
        """Shape of the tensor that holds a variable of `shape`; None where any with as many numbers will do."""
        if self.exact:
            return None
        shape = self._turned(np.empty(shape, "bool"), variable).shape
        if self.part is not None:
            _, count, axis = self.part
            axis %= len(shape)
            shape = (*shape[:axis], shape[axis] * count, *shape[axis + 1 :])
        return shape

    def to_ours(self, tensor, shape, variable):
        """What the variable is to hold, of `shape`, from the tensor of the file."""
        if self.part is not None:
            index, count, axis = self.part
            tensor = np.split(tensor, count, axis)[index]
        if self.exact:
            tensor = tensor.reshape(shape)
        else:
            tensor = self._turned(tensor, variable, back=True)
        return tensor + np.asarray(self.offset, tensor.dtype) if self.offset else tensor

    def to_file(self, value, variable):
        """The tensor of the file, or the part of it, that holds `value`."""
        value = value - np.asarray(self.offset, value.dtype) if self.offset else value
        return value if self.exact else self._turned(value, variable)

    def _turned(self, value, variable, back=False):
        """A kernel of Keras, (..., in, out), in torch's order (out, in, ...), or back."""
        if variable != "kernel" or not self.transposed:
            return value
        axes = range(value.ndim)
        if back:
            return value.transpose(*axes[2:], 1, 0)
        return value.transpose(axes[-1], axes[-2], *axes[:-2])


def packed(name, index, count=3, axis=0, transposed=True):
    """One of several projections that stand in one tensor."""
    return Stored(name, part=(index, count, axis), transposed=transposed)


def exact(name, shape):
    """A tensor by itself, of the same numbers as ours in the same order; -1 stands for one size of its `shape`."""
    return Stored(name, exact=True, shape=shape)


def match(paths, table):
    """Finds for each layer path the entry of a table, with the numbers filled in.

    Args:
        paths: list of str. Paths of layers.
        table: dict from pattern to `Stored` or str; `{i}` and `{j}` stand for numbers.

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
        fits = ((pattern.fullmatch(path), value) for pattern, value in patterns)
        fit, value = next(((fit, value) for fit, value in fits if fit), (None, None))
        if fit is None:
            raise KeyError(path)
        stored = Stored(value) if isinstance(value, str) else value
        found[path] = dataclasses.replace(stored, name=stored.name.format(**fit.groupdict()))
    return found
