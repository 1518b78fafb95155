"""The processes that train one model together, by `keras.distribution`, `tf.distribute` or `torch.distributed`.

All of what differs from backend to backend is here, and the backends are imported where they are used. Where one
process trains alone, each function is that of a group of one.
"""

import keras
import numpy as np


def rank(model):
    """Which of the processes that train `model` this one is: an integer, 0 for the one that writes files."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.process_index()
    if backend == "torch":
        import torch

        return torch.distributed.get_rank() if _is_torch_group(torch) else 0
    resolver = _workers(model)
    if resolver is None or resolver.task_type == "chief":
        return 0
    return resolver.task_id + ("chief" in resolver.cluster_spec().jobs)


def gather(model, array):
    """What each process gives, of one shape and dtype: numpy `[processes, ...]`. It returns when all have given it."""
    backend, array = keras.backend.backend(), np.asarray(array)
    if backend == "jax":
        import jax

        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import process_allgather

            return process_allgather(array)
    elif backend == "torch":
        import torch

        if _is_torch_group(torch):
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, array)
            return np.stack(parts)
    elif _workers(model) is not None:
        import tensorflow as tf

        strategy = model.distribute_strategy
        here = len(strategy.extended.worker_devices)

        def each_copy():
            return tf.distribute.get_replica_context().all_gather(tf.constant(array[None]), axis=0)

        return strategy.experimental_local_results(strategy.run(each_copy))[0].numpy()[::here]
    return array[None]


def mirrored_copies(model):
    """How many copies of the model `tf.distribute` keeps alike, by variables of their own."""
    return model.distribute_strategy.num_replicas_in_sync if keras.backend.backend() == "tensorflow" else 1


def to_numpy(variable):
    """A variable's value. All processes have to ask for it, as some hold a part of it only."""
    if keras.backend.backend() == "jax":
        value = variable.value
        if not value.is_fully_addressable and not value.is_fully_replicated:
            from jax.experimental.multihost_utils import process_allgather

            return process_allgather(value, tiled=True)
    return keras.ops.convert_to_numpy(variable)


def first_copy(model, batch):
    """A batch as one of the copies of the model sees it."""
    if keras.backend.backend() != "tensorflow":
        return batch
    return keras.tree.map_structure(lambda x: model.distribute_strategy.experimental_local_results(x)[0], batch)


def generator_states():
    """The states of torch's own generators, by name, from which dropout without a seed draws: uint8 arrays.

    Each start of a data loader draws from them as well.
    """
    if keras.backend.backend() != "torch":
        return {}
    import torch

    states = {"processor": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["gpu"] = torch.cuda.get_rng_state()
    return {name: state.numpy() for name, state in states.items()}


def set_generator_states(states):
    """Sets what `generator_states` has given, which is nothing where torch is not the backend, nor needed."""
    if not states:
        return
    import torch

    setters = {"processor": torch.set_rng_state, "gpu": torch.cuda.set_rng_state}
    for name, state in states.items():
        setters[name](torch.from_numpy(state.copy()))


def _is_torch_group(torch):
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _workers(model):
    """What tells the workers of `tf.distribute` apart, or None where there is one."""
    import tensorflow as tf

    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    several = strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)
    return strategy.cluster_resolver if several else None
