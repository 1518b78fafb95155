"""A training that is killed at any step goes on, and ends as if it had not been."""

import collections
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import zipfile

import keras
import numpy as np

from keras_transformer.training import processes


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
    nothing is shuffled, and for the batches of `kt.pipelines` with `first_epoch=resume.epoch`. It is not so for
    arrays with `shuffle=True`, nor for `tf.data.Dataset.shuffle`, whose order depends on how often it was started. On
    TensorFlow, `tf.config.experimental.enable_op_determinism()` makes the weights the same bit for bit.

    Where several processes train together, under `keras.distribution`, `tf.distribute` or `torch.distributed`, it has
    to be a callback in each of them, with a directory that all of them see. The first one writes; all read the same
    backup before any of them goes on. Of copies under `tf.distribute`, metrics go on to rounding.

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
        history: Dict from names to lists, what `fit` returns as `history.history`, of the epochs before it as well.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if the backup is that of another training, with what
            differs, or is not the same one for all processes. Nothing is changed then. Also if gradients are summed up
            over steps under `tf.distribute`, where each copy has its own, and if the data ends before the backup's.

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
        self._history, self._values, self._to_skip = [], None, 0

    @property
    def history(self):
        names = dict.fromkeys(name for logs in self._history for name in logs)
        return {name: [logs[name] for logs in self._history if name in logs] for name in names}

    def _newest(self):
        found = [path for path in self.directory.glob("epoch-*-batch-*") if _position(path)]
        return max(found, key=_position, default=None)

    def on_train_begin(self, logs=None):
        self._description = self._describe()
        newest = self._newest()
        self._check_alike(newest)
        self._history, self._values, self._to_skip = [], None, 0
        self._batches_seen_since_last_saving = 0
        if newest is not None:
            self._restore(newest)

    def _describe(self):
        """What has to be the same in the process that goes on, by part and name."""
        model = self.model
        if not model.built:
            raise ValueError(f"`model` must be built before `fit` for its training to be resumed; {model.name} is not.")
        copies = processes.mirrored_copies(model)
        accumulated = getattr(model.optimizer, "inner_optimizer", model.optimizer).gradient_accumulation_steps
        if copies > 1 and accumulated:
            raise ValueError(
                "`gradient_accumulation_steps` of the optimizer must be None under `tf.distribute`, where each copy "
                f"has a sum of its own, which no backup holds; received {accumulated} with {copies} copies."
            )
        optimizer = keras.saving.serialize_keras_object(model.optimizer)
        return {
            "weights": {
                f"{i} {_path(weight)}": f"{weight.dtype} {tuple(weight.shape)}"
                for i, weight in enumerate(model.weights)
            },
            "optimizer": {"class": optimizer["class_name"], **_without_names(optimizer["config"])},
            "steps": {"steps_per_execution": model.steps_per_execution},
            "data": {"batches in an epoch": self.params.get("steps"), **self.data},
        }

    def _check_alike(self, newest):
        """Each process has made its data by what it found when this object was made, and is to read the same now."""
        now = _position(newest) if newest else (0, 0)
        found = processes.gather(self.model, np.array([self.epoch, self.batch, *now], "int32")).tolist()
        for rank, position in enumerate(found):
            if position != found[0]:
                raise ValueError(
                    "`directory` must be one that all processes see, and hold the same backup for all of them. Process "
                    f"0 found one after {found[0][2]} epochs and {found[0][3]} batches, process {rank} one after "
                    f"{position[2]} and {position[3]}; when their `Resume` was made, after {found[0][:2]} and "
                    f"{position[:2]}."
                )

    def _restore(self, path):
        """Nothing is changed before every process has read the backup, and none can be deleted until then."""
        error = None
        try:
            state = self._read(path)
        except (ValueError, OSError) as caught:
            error = caught
        refused = processes.gather(self.model, np.array(error is not None, "int32"))
        if error:
            raise error
        if refused.any():
            raise ValueError(
                f"`directory` must be readable for all processes; number {refused.argmax()} refused {path}."
            )
        for kind in ("weight", "optimizer", "random"):
            self._assign(kind)
        later = ("metric", "generator")
        self._values = {name: value for name, value in self._values.items() if name.startswith(later)}
        self._restore_generators()
        self._history = state["history"]
        epoch, self._to_skip = _position(path)
        for callback in self.replay:
            for number, logs in enumerate(self._history):
                callback.on_epoch_end(number, dict(logs))
        # `fit` looks at `stop_training` at an epoch's end only.
        self.model._initial_epoch = self.params["epochs"] if self.model.stop_training else epoch

    def _read(self, path):
        state = json.loads((path / "state.json").read_text())
        differences = [
            f"{part}: {name} is {_short(before.get(name))} in the backup and {_short(now.get(name))} here"
            for part, now in self._description.items()
            for before in [state["description"].get(part, {})]
            for name in [*before, *(name for name in now if name not in before)]
            if before.get(name) != now.get(name)
        ]
        if differences:
            more = [f"and {len(differences) - 10} more"] if len(differences) > 10 else []
            listed = "\n  ".join(differences[:10] + more)
            raise ValueError(
                f"`directory` must be empty or hold a backup of this training; {path} is one of another:\n  {listed}"
            )
        with np.load(path / "values.npz") as values:
            self._values = dict(values)
        self.model.optimizer.build(self.model.trainable_variables)
        for kind in ("weight", "optimizer", "random"):
            self._check_shapes(kind)
        return state

    def _variables(self):
        """What the next step depends on, by kind, each in one order."""
        model = self.model
        kept = {id(variable) for variable in (*model.weights, *model.metrics_variables)}
        return {
            "weight": model.weights,
            "optimizer": model.optimizer.variables,
            "random": [variable for variable in model.variables if id(variable) not in kept],
            "metric": model.metrics_variables,
        }

    def _of_kind(self, kind):
        return [value for name, value in self._values.items() if name.startswith(f"{kind}_")]

    def _check_shapes(self, kind):
        variables, values = self._variables()[kind], self._of_kind(kind)
        if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
            raise ValueError(
                f"`model` must have the variables ({kind}) of the backup, of the shapes "
                f"{[value.shape for value in values]}; it has {[variable.path for variable in variables]}."
            )

    def _assign(self, kind):
        for variable, value in zip(self._variables()[kind], self._of_kind(kind), strict=True):
            # What numpy has no dtype for, such as bfloat16, it reads as bytes.
            variable.assign(value.view(variable.dtype) if value.dtype.kind == "V" else value)

    def _restore_generators(self):
        rank = processes.rank(self.model)
        states = {
            name.removeprefix("generator_"): x for name, x in self._values.items() if name.startswith("generator_")
        }
        processes.set_generator_states({name: x[rank % len(x)] for name, x in states.items()})

    def on_epoch_begin(self, epoch, logs=None):
        self._current_epoch, self._last_batch_seen = epoch, -1
        if self._to_skip:
            self._skip()

    def _skip(self):
        """Has `fit` pass over the next batches: it draws them, and its step on them is replaced by none."""
        model, train_function, logs = self.model, self.model.train_function, {}

        def restore_metrics():
            self._check_shapes("metric")
            self._assign("metric")
            logs.update(model.get_metrics_result())

        def pass_over(*arguments):
            *state, batches = arguments  # JAX hands its variables over, and takes them back.
            if hasattr(batches, "__next__"):  # TensorFlow's steps draw their own batches, and JAX's.
                batches = list(itertools.islice(batches, model.steps_per_execution))
            if not batches:
                raise StopIteration
            if not logs:  # On TensorFlow, the first step makes the metrics.
                model._symbolic_build(data_batch=processes.first_copy(model, batches[0]))
                restore_metrics()
            self._to_skip -= min(self._to_skip, model.steps_per_execution)
            if not self._to_skip:
                model.train_function = train_function
                self._restore_generators()
            return (logs, *state) if state else logs

        if len(self._of_kind("metric")) == len(model.metrics_variables):
            restore_metrics()
        model.train_function = pass_over
        self._last_batch_seen = self._to_skip - 1

    def on_train_batch_end(self, batch, logs=None):
        if batch > self._last_batch_seen:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._to_skip:
            raise ValueError(
                f"The data must be that of the backup, which was written after {self._last_batch_seen + 1} batches of "
                f"epoch {epoch}; here the epoch ended {self._to_skip} batches before."
            )
        self._history.append({name: float(value) for name, value in (logs or {}).items()})
        self._current_epoch, self._last_batch_seen = epoch + 1, -1
        self._save_model()

    def on_train_end(self, logs=None):
        self.model._initial_epoch = None
        if processes.rank(self.model) == 0 and self.delete_checkpoint and self.directory.exists():
            ended = self.directory.with_name(f"{self.directory.name}.ended")  # What is half deleted is no backup.
            shutil.rmtree(ended, ignore_errors=True)
            self.directory.rename(ended)
            shutil.rmtree(ended)
        # No other process looks at the directory before it is as it stays.
        processes.gather(self.model, np.array(0, "int32"))

    def _save_model(self):
        values = (
            (f"{kind}_{i}", processes.to_numpy(variable))
            for kind, variables in self._variables().items()
            for i, variable in enumerate(variables)
        )
        generators = (
            (f"generator_{name}", processes.gather(self.model, state))
            for name, state in processes.generator_states().items()
        )
        values = itertools.chain(values, generators)
        if processes.rank(self.model) == 0:
            self._write(values)
        else:
            collections.deque(values, maxlen=0)  # All processes have a part in it.

    def _write(self, values):
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        # As `np.savez` does it, which would hold all values at once.
        with zipfile.ZipFile(partial / "values.npz", "w") as archive:
            for name, value in values:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(value))
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
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = np.asarray(value)
    return f"{value.dtype} {value.shape} with the digest {_digest(np.ascontiguousarray(value).tobytes())}"


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _short(value):
    text = "missing" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
