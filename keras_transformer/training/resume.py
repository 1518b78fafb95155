"""A training that is killed at any step goes on, and ends as if it had not been."""

import hashlib
import json
import os
import pathlib
import re
import shutil

import keras
import numpy as np


class Resume(keras.callbacks.BackupAndRestore):
    """Keras' `BackupAndRestore`, exact to the batch: a resumed training ends with the weights of an uninterrupted one.

    `keras.callbacks.BackupAndRestore` keeps the weights and the state of the optimizer, and begins the epoch that was
    interrupted again: batches seen before are seen twice, dropout starts from its first state, and a process that is
    killed while it writes leaves a broken file. This callback keeps everything that the next step depends on:

    - weights, optimizer, the states of the random generators (dropout), and the metrics of the epoch so far,
    - the position in the data. The batches of the interrupted epoch that were trained on are read and passed over, so
      the steps of the epoch keep their numbers, and nothing is seen twice. Other callbacks are told of these as well,
    - the logs of the epochs so far, from which the callbacks in `replay` are brought to where they were.

    A backup is a directory, `epoch-00003-batch-000000250` for one after three epochs and 250 batches. It is written
    under another name, flushed to the disk and then renamed, and only then is the one before it deleted: whenever the
    process or the machine stops, a whole backup is there. A backup of another model, optimizer or data is refused.

    The data must be the same in every process: epoch *n* gives the same batches in the same order. That is so where
    nothing is shuffled, and for `kt.pipelines.token_batches(..., first_epoch=resume.epoch)`. It is not so for
    arrays with `shuffle=True`, nor for `tf.data.Dataset.shuffle`, whose order depends on how often it was started. On
    TensorFlow, `tf.config.experimental.enable_op_determinism()` makes the weights the same bit for bit.

    Let it be the last callback: an epoch is then done when all others have done their part of it.

    Args:
        directory: String or path of a directory for this callback alone.
        save_freq: `"epoch"`, or a positive integer: back up every so many batches, and at each epoch's end as well.
        data: Optional dict by which the data is recognized, from names to numbers, strings, arrays or lists; of the
            latter two a digest is kept. The number of batches in an epoch is compared without it.
        replay: Callbacks that keep a state of their own, such as `keras.callbacks.EarlyStopping`: after a resume their
            `on_epoch_end` is called for each epoch that was done. Whatever weights they keep are not brought back.
        delete_checkpoint: Boolean, whether to delete the backup when training has ended.

    Attributes:
        epoch: Integer, the number of whole epochs in the newest backup when this object was made.
        batch: Integer, the number of batches done of the epoch that follows.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if the backup is that of another training. It says what
            differs, and nothing is changed.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import numpy as np
    >>> from keras_transformer.training import Resume
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((6, 2)), np.ones((6, 1))
    >>> folder = tempfile.mkdtemp()
    >>> stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: 1 // (1 - batch))
    >>> fit = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    >>> try:
    ...     history = model.fit(x, y, **fit, callbacks=[stop, Resume(folder, save_freq=1, data={"x": x})])
    ... except ZeroDivisionError:
    ...     resume = Resume(folder, save_freq=1, data={"x": x})
    >>> resume.epoch, resume.batch
    (0, 1)
    >>> len(model.fit(x, y, **fit, callbacks=[resume]).history["loss"])
    2
    """

    def __init__(self, directory, save_freq="epoch", data=None, replay=(), delete_checkpoint=True):
        if save_freq != "epoch" and (isinstance(save_freq, bool) or not isinstance(save_freq, int) or save_freq < 1):
            raise ValueError(f"`save_freq` must be 'epoch' or a positive integer, of batches; received {save_freq!r}.")
        super().__init__(os.fspath(directory), save_freq, delete_checkpoint=delete_checkpoint)
        self.directory = pathlib.Path(directory)
        self.data = {name: _described(value) for name, value in (data or {}).items()}
        self.replay = list(replay)
        newest = self._newest()
        self.epoch, self.batch = _position(newest) if newest else (0, 0)
        self._history, self._others, self._to_skip = [], None, 0

    def _newest(self):
        found = [path for path in self.directory.glob("epoch-*-batch-*") if _position(path)]
        return max(found, key=_position, default=None)

    def on_train_begin(self, logs=None):
        self._description = self._describe()
        newest = self._newest()
        self._history, self._others, self._to_skip = [], None, 0
        self._batches_seen_since_last_saving = 0
        if newest is not None:
            self._load(newest)

    def _describe(self):
        """What has to be the same in the process that goes on, by part and name."""
        model = self.model
        if not model.built:
            raise ValueError(f"`model` must be built before `fit` for its training to be resumed; {model.name} is not.")
        optimizer = keras.saving.serialize_keras_object(model.optimizer)
        return {
            "weights": {
                f"{i} {_path(weight)}": f"{weight.dtype} {tuple(weight.shape)}"
                for i, weight in enumerate(model.weights)
            },
            "optimizer": {"class": optimizer["class_name"], **_without_names(optimizer["config"])},
            "data": {"batches in an epoch": self.params.get("steps"), **self.data},
        }

    def _load(self, path):
        state = json.loads((path / "state.json").read_text())
        differences = [
            f"{part}: {name} is {_short(before.get(name))} in the backup and {_short(now.get(name))} here"
            for part, now in self._description.items()
            for before in [state["description"][part]]
            for name in [*before, *(name for name in now if name not in before)]
            if before.get(name) != now.get(name)
        ]
        if differences:
            more = [f"and {len(differences) - 10} more"] if len(differences) > 10 else []
            listed = "\n  ".join(differences[:10] + more)
            raise ValueError(
                f"`directory` must be empty or hold a backup of this training; {path} is one of another:\n  {listed}"
            )
        model = self.model
        model.optimizer.build(model.trainable_variables)
        model.load_weights(path / "model.weights.h5")
        with np.load(path / "others.npz") as others:
            self._others = dict(others)
        self._restore("random", self._random_states())
        self._restore_torch()
        self._history = state["history"]
        epoch, self._to_skip = _position(path)
        for callback in self.replay:
            for number, logs in enumerate(self._history):
                callback.on_epoch_end(number, dict(logs))
        # `fit` looks at `stop_training` at an epoch's end only.
        model._initial_epoch = self.params["epochs"] if model.stop_training else epoch

    def _random_states(self):
        """What `save_weights` leaves out: the states of the random generators."""
        kept = {id(variable) for variable in (*self.model.weights, *self.model.metrics_variables)}
        return [variable for variable in self.model.variables if id(variable) not in kept]

    def _restore(self, kind, variables):
        values = [value for name, value in self._others.items() if name.startswith(kind)]
        if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
            raise ValueError(
                f"`model` must have the variables ({kind}) of the backup, of the shapes "
                f"{[value.shape for value in values]}; it has {[variable.path for variable in variables]}."
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _restore_torch(self):
        """There, dropout without a seed draws from the global generator, and so does each start of a data loader."""
        if keras.backend.backend() == "torch":
            import torch

            torch.set_rng_state(torch.from_numpy(self._others["torch"]))

    def on_epoch_begin(self, epoch, logs=None):
        self._current_epoch, self._last_batch_seen = epoch, -1
        if self._to_skip:
            self._skip()

    def _skip(self):
        """Has `fit` pass over the next batches: it draws them, and its step on them is replaced by none."""
        model, train_function, logs = self.model, self.model.train_function, {}

        def restore_metrics():
            self._restore("metric", model.metrics_variables)
            logs.update(model.get_metrics_result())

        def pass_over(*arguments):
            *state, batches = arguments  # JAX hands its variables over, and takes them back.
            if hasattr(batches, "__next__"):  # TensorFlow's steps draw their own batches.
                batches = [next(batches, None) for _ in range(model.steps_per_execution)]
            if not logs:  # There, the first step makes the metrics.
                model._symbolic_build(data_batch=batches[0])
                restore_metrics()
            self._to_skip -= min(self._to_skip, model.steps_per_execution)
            if not self._to_skip:
                model.train_function = train_function
                self._restore_torch()
            return (logs, *state) if state else logs

        if sum(name.startswith("metric") for name in self._others) == len(model.metrics_variables):
            restore_metrics()
        model.train_function = pass_over
        self._last_batch_seen = self._to_skip - 1

    def on_train_batch_end(self, batch, logs=None):
        if batch > self._last_batch_seen:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._history.append({name: float(value) for name, value in (logs or {}).items()})
        self._current_epoch, self._last_batch_seen = epoch + 1, -1
        self._save_model()

    def on_train_end(self, logs=None):
        self.model._initial_epoch = None
        if self.delete_checkpoint and self.directory.exists():
            ended = self.directory.with_name(f"{self.directory.name}.ended")  # What is half deleted is no backup.
            shutil.rmtree(ended, ignore_errors=True)
            self.directory.rename(ended)
            shutil.rmtree(ended)

    def _save_model(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self.model.save_weights(partial / "model.weights.h5")
        others = {"random": self._random_states(), "metric": self.model.metrics_variables}
        others = {f"{kind}_{i}": value for kind, values in others.items() for i, value in enumerate(values)}
        others = {name: keras.ops.convert_to_numpy(value) for name, value in others.items()}
        if keras.backend.backend() == "torch":
            import torch

            others["torch"] = torch.get_rng_state().numpy()
        np.savez(partial / "others.npz", **others)
        state = {"description": self._description, "history": self._history}
        (partial / "state.json").write_text(json.dumps(state))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        name = f"epoch-{self._current_epoch:05d}-batch-{self._last_batch_seen + 1:09d}"
        partial.rename(self.directory / name)
        _flush(self.directory)
        for path in self.directory.glob("epoch-*-batch-*"):
            if path.name != name:
                shutil.rmtree(path)


def _position(path):
    match = re.fullmatch(r"epoch-(\d+)-batch-(\d+)", path.name)
    return tuple(map(int, match.groups())) if match else None


def _path(weight):
    """Without the numbers that Keras gives to names, which count the layers that the process has made before."""
    return re.sub(r"_\d+(?=/|$)", "", weight.path)


def _without_names(config):
    if isinstance(config, dict):
        return {key: _without_names(value) for key, value in config.items() if key != "name"}
    return config if isinstance(config, (bool, int, float, str, type(None))) else str(config)


def _flush(path):
    """Returns when the file or directory is on the disk, as far as the system can tell."""
    if os.name == "posix":  # Others cannot open a directory.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _described(value):
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return f"{len(value)} items with the digest {_digest(repr(list(value)).encode())}"
    value = np.asarray(value)
    return f"{value.dtype} {value.shape} with the digest {_digest(np.ascontiguousarray(value).tobytes())}"


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _short(value):
    text = "missing" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
