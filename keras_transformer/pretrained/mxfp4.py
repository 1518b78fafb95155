"""Tensors in MXFP4: numbers of 4 bits, two to a byte, with an exponent for each 32 of them.

Reference: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, section 5
"""

from collections.abc import Mapping

import numpy as np

from keras_transformer.pretrained.safetensors_file import numpy_dtype

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], "float32")
# The two numbers of each byte: the lower half comes first.
PAIRS = np.stack([np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)], axis=-1)  # [256, 2]
BYTES = 16
BIAS = 127


class Unpacked(Mapping):
    """A checkpoint with its packed tensors as bfloat16, which holds every number of the format exactly.

    A tensor of kernels `[experts, in, out]` is packed as `<name>_blocks` `[experts, out, in / 32, 16]` and
    `<name>_scales` `[experts, out, in / 32]`, both of bytes; here it is `<name>`. The last one that was read is kept.

    Args:
        checkpoint: `Checkpoint`.

    Raises:
        ValueError: if blocks and scales do not fit each other.

    Example:

    >>> from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint
    >>> blocks, scales = np.full((1, 1, 1, 16), 0x72, "uint8"), np.full((1, 1, 1), 128, "uint8")
    >>> write_checkpoint("packed", {}, {"up_blocks": blocks, "up_scales": scales})
    >>> checkpoint = Unpacked(Checkpoint("packed"))
    >>> list(checkpoint), checkpoint.shape("up"), [float(number) for number in checkpoint["up"][0, :3, 0]]
    (['up'], (1, 32, 1), [2.0, 12.0, 2.0])
    """

    def __init__(self, checkpoint):
        self.directory = checkpoint.directory
        self._checkpoint = checkpoint
        self._packed = {name.removesuffix("_blocks") for name in checkpoint if name.endswith("_blocks")}
        self._last = None, None
        for name in sorted(self._packed):
            self._check(name)

    def _check(self, name):
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        if scales not in self._checkpoint:
            raise ValueError(f"{blocks} in {self.directory} must come with {scales}, which is missing.")
        shapes = [self._checkpoint.shape(part) for part in (blocks, scales)]
        kinds = [self._checkpoint.dtype(part) for part in (blocks, scales)]
        if len(shapes[0]) != 4 or shapes[0] != (*shapes[1], BYTES) or kinds != ["uint8", "uint8"]:
            raise ValueError(
                f"{blocks} in {self.directory} must have shape (experts, out, in / 32, {BYTES}), {scales} the same "
                f"without its last size, and both be of uint8; received {shapes} of {kinds}."
            )

    def shape(self, name):
        if name not in self._packed:
            return self._checkpoint.shape(name)
        experts, outputs, groups, size = self._checkpoint.shape(f"{name}_blocks")
        return experts, groups * size * 2, outputs

    def __getitem__(self, name):
        if name not in self._packed:
            return self._checkpoint[name]
        if self._last[0] != name:
            self._last = None, None  # Let go of it before there is another.
            self._last = name, self._unpack(name)
        return self._last[1]

    def _unpack(self, name):
        blocks, scales = (self._checkpoint[f"{name}_{part}"] for part in ("blocks", "scales"))
        tensor = np.empty(self.shape(name), numpy_dtype("bfloat16"))
        for expert in range(len(tensor)):  # One at a time, as float32 takes eight times the room of the file.
            factor = np.exp2(scales[expert].astype("float32") - BIAS)  # [out, groups]
            numbers = PAIRS[blocks[expert]].reshape(*factor.shape, -1) * factor[..., None]  # [out, groups, 32]
            tensor[expert] = numbers.reshape(len(factor), -1).T
        return tensor

    def __iter__(self):
        for name in self._checkpoint:
            base = name.removesuffix("_blocks")
            if base in self._packed:
                yield base
            elif name.removesuffix("_scales") not in self._packed or not name.endswith("_scales"):
                yield name

    def __len__(self):
        return len(self._checkpoint) - len(self._packed)

    __eq__ = object.__eq__
    __hash__ = object.__hash__
