"""A compiled training step for torch, whose compiler is slow at reading Keras' layers: they are run once instead.

What they do with stand-ins for tensors is written down operation by operation, which is what torch gets to compile.
"""

import keras
from keras import tree


def compile_step(model, with_optimizer=False):
    """Lets `model.fit` train by a compiled step on torch as well, where `jit_compile=True` would compile for minutes.

    Call it after `model.compile`, which forgets it again. Forward pass, loss, metrics and gradients become one compiled
    graph. There is one for each shape of a batch: let all batches have the same. On JAX and TensorFlow, where Keras
    compiles the step by itself, this does nothing.

    Padding is not looked at while compiling: attention gets a mask where token id 0 may occur, and is faster in a model
    whose embeddings have `mask_zero=False`.

    Args:
        model: compiled and built `keras.Model` with Keras' own `train_step`.
        with_optimizer: boolean. Whether to compile the optimizer's update as well, which can take as long as the rest
            where a model has many weights. One that looks at values to decide what to do (loss scaling, accumulated
            gradients, averaged weights) runs as before.

    Returns:
        `model`.

    Raises:
        ValueError: if the model is not compiled, not built, or has a `train_step` of its own; in `fit`, if a layer asks
            what a tensor holds, as `Dropout` with a seed does on torch.

    Example:

    >>> import keras_transformer as kt
    >>> model = kt.models.causal_lm(100, dim=32, depth=2, dropout=0.0)
    >>> model.compile("adamw", kt.training.SmoothedCrossEntropy(0.0))
    >>> model = kt.training.compile_step(model)
    """
    if not model.compiled or not model.built:
        raise ValueError("`compile_step` needs a model that is compiled and built; call `model.compile` first.")
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(f"`compile_step` replaces `train_step`, of which {type(model).__name__} has its own.")
    if keras.backend.backend() == "torch":
        model.train_function = _TorchStep(model, with_optimizer)
    return model


class _TorchStep:
    """A training step as Keras' trainer for torch does it, compiled for each shape of a batch."""

    def __init__(self, model, with_optimizer):
        self.model = model
        self.losses = {}
        self.update = None if with_optimizer else self._apply

    def __call__(self, data):
        import torch

        model, optimizer = self.model, self.model.optimizer
        batch = keras.utils.unpack_x_y_sample_weight(data[0])
        batch = tree.map_structure(lambda x: None if x is None else keras.ops.convert_to_tensor(x), batch)
        kind = str(tree.map_structure(lambda x: x if x is None else (tuple(x.shape), x.dtype), batch))
        trained, kept = model.trainable_variables, model.non_trainable_variables + model.metrics_variables
        if kind not in self.losses:
            self.losses[kind] = _captured(self._loss, _values(trained), _values(kept), batch)
            if self.losses[kind] is None:
                raise ValueError(
                    "`compile_step` cannot compile a model whose layers, loss or metrics ask in Python what a tensor "
                    "holds, as those do on torch that draw with a seed of their own, such as `Dropout(seed=1)`."
                )
        weights = _values(trained)
        loss, updated, logs = self.losses[kind](weights, _values(kept), batch)
        gradients = torch.autograd.grad(optimizer.scale_loss(loss), weights, allow_unused=True)
        with torch.no_grad():
            for variable, value in zip(kept, updated, strict=True):
                if value is not None:
                    variable.assign(value)
            optimizer.build(trained)
            arguments = list(gradients), _values(optimizer.variables), _values(trained)
            if self.update is None:
                self.update = _captured(self._update, *arguments) or self._apply
            self.update(*arguments)
        return logs

    def _loss(self, weights, others, batch):
        """The loss to derive, new values of the other variables (None where they keep theirs), and what `fit` shows."""
        model, (x, y, sample_weight) = self.model, batch
        trained, kept = model.trainable_variables, model.non_trainable_variables + model.metrics_variables
        mapping = [*zip(trained, weights, strict=True), *zip(kept, others, strict=True)]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            predicted = model(x, training=True)
            loss = model.compute_loss(x, y, predicted, sample_weight, training=True)
            rows = next(part for part in tree.flatten(x) if part is not None).shape[0]
            model._loss_tracker.update_state(loss.detach(), sample_weight=rows)
            logs = model.compute_metrics(x, y, predicted, sample_weight=sample_weight)
            found = [scope.get_current_value(variable) for variable in kept]
        updated = [None if new is old else new.detach() for new, old in zip(found, others, strict=True)]
        return loss, updated, tree.map_structure(lambda x: x.detach(), logs)

    def _apply(self, gradients, *_):
        self.model.optimizer.apply(gradients, self.model.trainable_variables)

    def _update(self, gradients, state, weights):
        """Lets the optimizer write new values into all tensors of its own and of the weights."""
        optimizer, trained = self.model.optimizer, self.model.trainable_variables
        mapping = [*zip(optimizer.variables, state, strict=True), *zip(trained, weights, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            optimizer.apply(gradients, trained)
            for variable, value in mapping:
                new = scope.get_current_value(variable)
                if new is not value:
                    value.copy_(new)


def _values(variables):
    return [variable.value for variable in variables]


def _captured(function, *arguments):
    """`function` compiled for tensors like `arguments`, or None where it asks what they hold.

    It is called once, with stand-ins that have shapes and no numbers.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        graph = make_fx(lambda *given: function(*given), tracing_mode="fake", pre_dispatch=True)(*arguments)
    except GuardOnDataDependentSymNode:
        return None
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)
    return lambda *given: compiled(*given)  # What torch returns is an empty module, which counts as False.
