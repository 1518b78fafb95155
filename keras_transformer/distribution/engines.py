"""Copies of a model that are trained together: `keras.distribution`, `tf.distribute` and `DistributedDataParallel`.

All of what differs from backend to backend is here, and the backends are imported where they are used.
"""

import contextlib
import datetime
import json
import os

import keras

from keras_transformer.distribution.layouts import layout_map
from keras_transformer.training import processes

# Seconds: until all processes have to be there; that torch waits for one in a step; and after which JAX holds one
# for dead that does not stir.
START, PATIENCE, HEARTBEAT = 300, 60, 30


def start(hosts=None, rank=0, model_parallel=1):
    """Joins the other processes of a training, by the engine of Keras' backend.

    To be called before anything is computed. On JAX that is `keras.distribution`, where each process has one or several
    devices; on TensorFlow `tf.distribute.MultiWorkerMirroredStrategy`, or `MirroredStrategy` where there is one process
    with one or several devices; on torch `DistributedDataParallel`, where each process has one device: the GPU that
    `CUDA_VISIBLE_DEVICES` leaves it, or the processor. It returns when all processes have come.

    Args:
        hosts: List of strings `"address:port"`, where each process can be reached, in the order of their ranks. `None`
            for one process. JAX and torch use the first one only.
        rank: Integer. The place of this process in `hosts`. The first one, 0, is the one to write files.
        model_parallel: Integer. How many devices share one copy of the weights, by `layout_map`. Other than 1 on JAX
            only, where it must divide the number of devices of each process: what the devices exchange for each layer
            is too much for the links between machines.

    Returns:
        `Engine`.

    Raises:
        ValueError: If `rank` is not a place in `hosts`, or `model_parallel` is not what the devices allow.

    Example:

    >>> engine = kt.distribution.start()
    >>> engine.processes, engine.rank
    (1, 0)
    """
    backend = keras.backend.backend()
    hosts = list(hosts or ["127.0.0.1:12355"])
    if not 0 <= rank < len(hosts):
        raise ValueError(f"`rank` must be a place in `hosts`, 0 to {len(hosts) - 1}; received rank={rank}.")
    if model_parallel != 1 and backend != "jax":
        raise ValueError(
            f"`model_parallel` must be 1 unless Keras' backend is JAX, on which alone it splits weights; received "
            f"model_parallel={model_parallel} on {backend}."
        )
    if backend == "jax":
        return JaxEngine(hosts, rank, model_parallel)
    return {"tensorflow": TensorFlowEngine, "torch": TorchEngine}[backend](hosts, rank)


class Engine:
    """Copies of a model that are trained as one, on the same batches: what `start` returns.

    In each process alike, with one random seed: make the model and `compile` it, `fit` its copy on this process's rows
    of the batches within the scope, and take the weights back. Losses, metrics and weights are those of one process on
    one device, to rounding:

    - `fit` sees the same batches, whose rows are dealt out to the copies. A token weighs the same, in whatever copy it
      is, as the copy's loss is a sum and the rows come with weights.
    - Gradients are added up over the copies at each step. On TensorFlow they are clipped before that, copy by copy.
    - Copies on TensorFlow and torch drop out the same places of their rows. On JAX, dropout is that of one device.

    Attributes:
        processes: Integer. How many there are.
        rank: Integer. Which one this is.

    Example:

    >>> import tensorflow as tf
    >>> engine = kt.distribution.start()
    >>> model = kt.models.causal_lm(10, dim=4, depth=1, num_heads=1)
    >>> model.compile("sgd", kt.training.SmoothedCrossEntropy())
    >>> batches = tf.data.Dataset.from_tensors(({"token_ids": [[1, 5, 6]]}, [[5, 6, 2]]))
    >>> trained = engine.copy(model)
    >>> with engine.scope():
    ...     history = trained.fit(engine.rows(batches), verbose=0)
    >>> engine.take_back(trained, model)
    >>> engine.stop()
    """

    def __init__(self, hosts, rank):
        self.processes = len(hosts)
        self.rank = rank

    def copy(self, model):
        """A model of the same layers and weights that trains together with its copies in the other processes.

        Args:
            model: functional `keras.Model`, made and compiled in every process alike, with a `keras.losses.Loss` that
                takes a mean, such as `SmoothedCrossEntropy`.

        Returns:
            `keras.Model`, compiled alike. `kt.training.Resume` has to be a callback in every process, callbacks that
            write in one of them.

        Raises:
            ValueError: If the model has not been compiled with a `keras.losses.Loss`.
        """
        raise NotImplementedError

    def scope(self):
        """The context in which the copy is trained."""
        raise NotImplementedError

    def rows(self, batches):
        """This process's rows of each batch, for `fit` and `evaluate` of the copy.

        Args:
            batches: `tf.data.Dataset` of `(inputs, labels)`, the same in every process, with the id 0 for padding in
                the labels, as `token_batches` makes them. Its cardinality has to be known.

        Returns:
            A dataset of `(inputs, labels, weights)`, with rows of padding where a batch cannot be dealt out evenly.
        """
        raise NotImplementedError

    def take_back(self, trained, model):
        """Puts the weights and the optimizer's state of the copy into the model that it is a copy of."""
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        pairs = [(model.variables, trained.variables), (model.optimizer.variables, trained.optimizer.variables)]
        for own, others in pairs:
            for variable, other in zip(own, others, strict=True):
                variable.assign(processes.to_numpy(other))

    def stop(self):
        """Leaves the other processes, which may end from here on."""


class JaxEngine(Engine):
    """One program over the devices of all processes, which XLA splits."""

    def __init__(self, hosts, rank, model_parallel):
        import jax

        super().__init__(hosts, rank)
        if self.processes > 1:
            # `keras.distribution.initialize` calls the same, but leaves it more than a minute to find a process dead.
            jax.distributed.initialize(
                hosts[0], self.processes, rank, initialization_timeout=START, heartbeat_timeout_seconds=HEARTBEAT
            )
        if jax.local_device_count() % model_parallel:
            raise ValueError(
                f"`model_parallel` must divide the number of devices of each process, {jax.local_device_count()}; "
                f"received model_parallel={model_parallel}."
            )
        self.copies, self.model_parallel = jax.device_count() // model_parallel, model_parallel
        self.distribution = None

    def copy(self, model):
        devices = keras.distribution.list_devices()
        if self.model_parallel == 1:
            self.distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        else:
            mesh = keras.distribution.DeviceMesh((self.copies, self.model_parallel), ("batch", "model"), devices)
            self.distribution = keras.distribution.ModelParallel(
                layout_map=layout_map(model, mesh), batch_dim_name="batch", auto_shard_dataset=False
            )
        with self.scope():
            return _compiled_as(model, _clone(model))

    def scope(self):
        return self.distribution.scope()

    def rows(self, batches):
        return _rows(batches, self.processes, [self.rank], multiple=self.copies)

    def stop(self):
        import jax

        jax.distributed.shutdown()


class TensorFlowEngine(Engine):
    """A copy on each device of each process, whose variables a strategy mirrors."""

    def __init__(self, hosts, rank):
        super().__init__(hosts, rank)
        if self.processes > 1:
            os.environ["TF_CONFIG"] = json.dumps(
                {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
            )
        from tensorflow import config, distribute

        if self.processes > 1:
            self.strategy = distribute.MultiWorkerMirroredStrategy()
        else:  # By itself it would take one processor, however many virtual devices that has been made.
            devices = config.list_logical_devices("GPU") or config.list_logical_devices("CPU")
            self.strategy = distribute.MirroredStrategy([device.name for device in devices])
        self.copies = self.strategy.num_replicas_in_sync

    def copy(self, model):
        import tensorflow as tf

        class Copies(keras.Model):
            def get_metrics_result(self):
                result = super().get_metrics_result()
                if tf.distribute.in_cross_replica_context():
                    return result
                # Between workers `fit` takes a mean along an axis, which a number does not have.
                return {name: tf.reshape(value, [1]) for name, value in result.items()}

        with self.scope():
            clone = _clone(model)
        # Made outside of the scope, where `fit` does not try to build it anew from the mean of a batch of token ids.
        copies = (Copies if self.processes > 1 else keras.Model)(clone.input, clone.output)
        with self.scope():
            return _compiled_as(model, copies)

    def scope(self):
        return self.strategy.scope()

    def rows(self, batches):
        here = self.copies // self.processes
        own = range(self.rank * here, (self.rank + 1) * here)
        rows = self.strategy.distribute_datasets_from_function(
            lambda context: _rows(batches, self.copies, own, multiple=self.copies)
        )
        rows._cardinality = int(batches.cardinality())  # It counts what each device here gets for a batch of its own.
        return rows


class TorchEngine(Engine):
    """A copy in each process, whose gradients `DistributedDataParallel` averages."""

    def __init__(self, hosts, rank):
        import torch

        super().__init__(hosts, rank)
        if self.processes > 1:
            address, port = hosts[0].rsplit(":", 1)
            until, limit = datetime.timedelta(seconds=START), datetime.timedelta(seconds=PATIENCE)
            store = torch.distributed.TCPStore(address, int(port), self.processes, rank == 0, until)
            engine = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(
                engine, store=store, rank=rank, world_size=self.processes, timeout=limit
            )

    def copy(self, model):
        import torch

        clone = _clone(model)
        if self.processes == 1:
            return _compiled_as(model, clone)
        parallel = torch.nn.parallel.DistributedDataParallel(clone)

        class Copies(keras.Model):
            def train_step(self, data):
                x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
                self.zero_grad()
                y_pred = parallel(x, training=True)
                loss = self.compute_loss(x, y, y_pred, weights, training=True)
                self._loss_tracker.update_state(loss, sample_weight=y.shape[0])
                loss = self.optimizer.scale_loss(loss)
                loss.backward()
                variables = self.trainable_weights
                with torch.no_grad():
                    self.optimizer.apply([variable.value.grad for variable in variables], variables)
                return self.compute_metrics(x, y, y_pred, weights)

            def get_metrics_result(self):
                sums = torch.stack([variable.value.detach() for variable in self.metrics_variables])
                torch.distributed.all_reduce(sums)
                for variable, total in zip(self.metrics_variables, sums, strict=True):
                    variable.assign(total / torch.distributed.get_world_size())
                return super().get_metrics_result()

        return _compiled_as(model, Copies(clone.input, clone.output))

    def scope(self):
        return contextlib.nullcontext()

    def rows(self, batches):
        # Gradients are averaged here, where the other engines add them up.
        return _rows(batches, self.processes, [self.rank], multiple=self.processes, scale=self.processes)

    def stop(self):
        import torch

        if self.processes > 1:
            torch.distributed.destroy_process_group()


def _clone(model):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def _compiled_as(model, copies):
    """Compiles `copies` as `model` is, but for a loss that is a sum: the rows come with weights of which it is made."""
    if not isinstance(getattr(model, "loss", None), keras.losses.Loss):
        received = getattr(model, "loss", None)
        raise ValueError(f"`model` must be compiled with a `keras.losses.Loss`; its loss is {received!r}.")
    copies.compile_from_config(model.get_compile_config())
    copies.loss.reduction = "sum"
    return copies


def _rows(batches, parts, own, multiple, scale=1.0):
    """Each batch's rows in so many equal parts, of which the own ones come one after the other.

    Rows are filled up to a multiple, and a token weighs `scale` over the number of tokens in the whole batch.
    """
    import tensorflow as tf

    def cut(inputs, labels):
        real = tf.cast(labels != 0, "float32")
        missing = -tf.shape(labels)[0] % multiple

        def own_rows(x):
            x = tf.pad(x, [[0, missing], *[[0, 0]] * (x.shape.rank - 1)])
            return tf.reshape(x, tf.concat([[parts, -1], tf.shape(x)[1:]], 0))[own[0] : own[-1] + 1]

        weights = tf.math.divide_no_nan(real * scale, tf.reduce_sum(real))
        return tf.nest.map_structure(own_rows, (inputs, labels, weights))

    size = batches.cardinality() * len(own)
    return batches.map(cut).unbatch().apply(tf.data.experimental.assert_cardinality(size)).prefetch(8)
