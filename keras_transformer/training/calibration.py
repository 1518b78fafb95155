"""What Keras' GPTQ asks of a model: inputs to calibrate with, and its layers in the order in which they run."""

import keras
import numpy as np
from keras import ops

from keras_transformer.models.functional import check_functional

QUANTIZED = (keras.layers.Dense, keras.layers.EinsumDense)


def gptq_config(model, inputs, batch_size=8, **options):
    """What `model.quantize("gptq", config=...)` needs of a functional model, whatever its inputs are.

    The layers with weights are quantized one after the other, blocks as a whole, each for what those before it make of
    the inputs once they are quantized.

    Args:
        model: functional `keras.Model`.
        inputs: what `model.predict` takes: array, or list or dict of arrays, such as a hundred rows of training data.
        batch_size: int. How many rows run at once.
        **options: arguments of `keras.quantizers.GPTQConfig`: `weight_bits`, `group_size`, `symmetric` and so on.

    Returns:
        `keras.quantizers.GPTQConfig`.

    Raises:
        ValueError: if `model` is no functional model, or `inputs` have no rows.

    Reference: [GPTQ](https://arxiv.org/abs/2210.17323).

    Example:

    >>> import contextlib, io
    >>> model = kt.models.text_classifier(20, 2, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> ids = np.random.default_rng(0).integers(1, 20, (16, 6))
    >>> with contextlib.redirect_stdout(io.StringIO()):  # Keras shows how far it is.
    ...     model.quantize("gptq", config=gptq_config(model, ids, group_size=-1))
    >>> model.get_layer("logits").quantization_mode
    'gptq'
    """
    check_functional(model)
    rows = min((len(x) for x in keras.tree.flatten(inputs)), default=0)
    if rows == 0:
        raise ValueError("`inputs` must have rows to calibrate with; received none.")
    batches = [
        keras.tree.map_structure(lambda x, begin=begin: ops.convert_to_tensor(x[begin : begin + batch_size]), inputs)
        for begin in range(0, rows, batch_size)
    ]
    ends = {}  # Of each layer, the tensors of its last call.
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input and isinstance(node.operation, keras.layers.Layer):
                ends.pop(id(node.operation), None)
                ends[id(node.operation)] = (node.operation, node.outputs)
    blocks = [
        CalibratedLayer(layer, keras.Model(model.input, outputs), batches)
        for layer, outputs in ends.values()
        if any(isinstance(part, QUANTIZED) for part in layer._flatten_layers())
    ]
    return Calibration(
        # The texts that Keras calibrates with are numbers of batches here, one token each.
        dataset=[np.arange(len(batches), dtype="int32")],
        tokenizer=lambda numbers: numbers,
        num_samples=len(batches),
        sequence_length=1,
        quantization_layer_structure={"pre_block_layers": [], "sequential_blocks": blocks},
        **options,
    )


@keras.saving.register_keras_serializable(package="keras_transformer")
class Calibration(keras.quantizers.GPTQConfig):
    """A configuration that is saved with a quantized layer, without the layers that it was calibrated by."""

    def get_config(self):
        return {**super().get_config(), "quantization_layer_structure": None}


class CalibratedLayer(keras.layers.Layer):
    """A layer of a model, to be called with the number of a batch of the model's inputs, which it hands on.

    Args:
        layer: `keras.layers.Layer`, the only one that is found in this one.
        until: `keras.Model` from the model's inputs to the result of the layer.
        batches: list of inputs.
    """

    def __init__(self, layer, until, batches):
        super().__init__()
        self.layer = layer
        for part in layer._flatten_layers():
            if isinstance(part, QUANTIZED):
                _save_zero_points(part)
        self.run = lambda number: until(batches[number], training=False)
        self.built = True

    def call(self, number):
        self.run(int(ops.convert_to_numpy(number).reshape(-1)[0]))
        return number


def _save_zero_points(layer):
    """Lets a layer save the zero points of its kernel: Keras 3.15 leaves them out and asks for them when loading."""
    merged = layer._get_kernel_with_merged_lora

    def with_zero_points():
        kernel, scale, zero = merged()
        return kernel, scale, layer.kernel_zero if zero is None and layer.quantization_mode == "gptq" else zero

    layer._get_kernel_with_merged_lora = with_zero_points
