"""Convolutions and the pooling between them, in plain numpy: each number from one window of what went in."""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from keras_transformer.inspection.arithmetic import Formula, activation, array


def convolution_formula(layer):
    function = activation(layer.activation)
    plain = layer.groups == 1 and set(layer.dilation_rate) == {1} and layer.data_format == "channels_last"
    if function is None or not plain or layer.padding not in ("same", "valid"):
        return None
    text = "windows of x · W" + (" + b" if layer.use_bias else "")
    if layer.activation.__name__ != "linear":
        text = f"{layer.activation.__name__}({text})"
    return Formula(text, lambda _, x: function(convolved(layer, x)))


def pooling_formula(layer):
    if layer.data_format != "channels_last":
        return None

    def compute(_, x):
        cut = windows(x, layer.pool_size, layer.strides, layer.padding, -np.inf)
        return cut.max(axis=tuple(range(x.ndim - 1, cut.ndim - 1)))

    return Formula("the largest of each window", compute)


def subsampling_formula(layer):
    """That of `FrameSubsampling`, whose convolutions read zeros beside the frames and in place of padding."""
    function = activation(layer.activation)
    if function is None:
        return None

    def compute(_, x, real=None):
        for convolution in layer.layers:
            x = x if real is None else x * real[:, :, None]
            x = function(convolved(convolution, np.pad(x, ((0, 0), (1, 1), (0, 0)))))
            real = None if real is None else real[:, ::2]
        return x if real is None else x * real[:, :, None]

    step = f"{layer.activation.__name__}(three frames · W + b)"
    return Formula(f"{len(layer.layers)} times {step}, every second", compute)


def convolved(layer, x):
    """What a convolution makes of `x` before its activation."""
    cut = windows(x, layer.kernel_size, layer.strides, layer.padding, 0.0)  # [B, *places, *window, channels]
    result = np.tensordot(cut, array(layer.kernel), len(layer.kernel_size) + 1)
    return result + array(layer.bias) if layer.use_bias else result


def windows(x, size, strides, padding, filling):
    """The windows of `x` `[B, *sizes, channels]`: `[B, *places, *size, channels]`.

    With `padding="same"` there is a window for each `stride` of the places, and `filling` beside `x` so that the last
    one has room: half of it in front, the odd one behind.
    """
    axes = range(1, 1 + len(size))
    if padding == "same":
        missing = [
            max(0, (math.ceil(x.shape[axis] / stride) - 1) * stride + width - x.shape[axis])
            for axis, width, stride in zip(axes, size, strides, strict=True)
        ]
        beside = [(0, 0), *((count // 2, count - count // 2) for count in missing), (0, 0)]
        x = np.pad(x, beside, constant_values=filling)
    cut = sliding_window_view(x, tuple(size), tuple(axes))  # [B, *starts, channels, *size]
    cut = cut[(slice(None), *(slice(None, None, stride) for stride in strides))]
    return np.moveaxis(cut, len(size) + 1, -1)
