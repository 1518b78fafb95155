"""Learning-rate schedules."""

import numbers

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_transformer")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then decay with the inverse square root of the step.

    Equation 3 of [Attention Is All You Need](https://arxiv.org/abs/1706.03762):

    `rate = scale * dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)`

    With `peak`, the same curve is pinned to the rate reached at the end of the warm-up instead of to the model's
    width, the way fairseq's `inverse_sqrt` is configured: a straight line from `initial` to `peak`, then
    `peak * (warmup_steps / step)**0.5`.

    Keras counts steps from 0, the paper from 1: the first update uses step 1 of the formula, and the highest rate
    belongs to the update number `warmup_steps`.

    Args:
        dim: Positive integer, width of the model (`d_model` in the paper). May be `None` when `peak` is given, which
            does not depend on it.
        warmup_steps: Positive integer, number of updates during which the rate rises.
        scale: Positive float, multiplies the whole curve. Not together with `peak`.
        peak: Positive float or `None`, the rate at the end of the warm-up. `None` takes it from `dim`.
        initial: Float, the rate from which the warm-up starts. Only together with `peak`.

    Raises:
        ValueError: If an argument is out of range, or two of them contradict each other.

    Example:

    >>> import keras
    >>> from keras_transformer.training import InverseSquareRoot
    >>> schedule = InverseSquareRoot(512, warmup_steps=4000)
    >>> print(f"{float(schedule(3999)):.6f} {float(schedule(15999)):.6f}")
    0.000699 0.000349
    >>> optimizer = keras.optimizers.Adam(schedule, beta_2=0.98, epsilon=1e-9)
    """

    def __init__(self, dim, warmup_steps, scale=1.0, peak=None, initial=0.0):
        super().__init__()
        if not (dim is None and peak is not None):
            _check_positive("dim", dim, numbers.Integral, "a positive integer, the width of the model")
        _check_positive("warmup_steps", warmup_steps, numbers.Integral, "a positive integer, a number of updates")
        _check_positive("scale", scale, numbers.Real, "a positive number")
        if peak is None:
            if initial != 0.0:
                raise ValueError(
                    "`initial` is the start of a warm-up that ends at `peak`: pass `peak` as well. "
                    f"Received: initial={initial}, peak=None"
                )
        else:
            _check_positive("peak", peak, numbers.Real, "a positive number, the rate at the end of the warm-up")
            if scale != 1.0:
                raise ValueError(
                    "`peak` fixes the height of the curve, so `scale` must stay 1.0. "
                    f"Received: scale={scale}, peak={peak}"
                )
            if not 0.0 <= initial <= peak:
                raise ValueError(f"`initial` must lie between 0 and `peak`. Received: initial={initial}, peak={peak}")
        self.dim = None if dim is None else int(dim)
        self.warmup_steps = int(warmup_steps)
        self.scale = float(scale)
        self.peak = None if peak is None else float(peak)
        self.initial = float(initial)

    def __call__(self, step):
        step = ops.cast(step, "float32") + 1.0
        peak = self.scale * (self.dim * self.warmup_steps) ** -0.5 if self.peak is None else self.peak
        warmup = self.initial + (peak - self.initial) * (step / self.warmup_steps)
        decay = peak * ops.sqrt(self.warmup_steps / step)
        return ops.where(step < self.warmup_steps, warmup, decay)

    def get_config(self):
        return {
            "dim": self.dim,
            "warmup_steps": self.warmup_steps,
            "scale": self.scale,
            "peak": self.peak,
            "initial": self.initial,
        }


def _check_positive(name, value, kind, wanted):
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
