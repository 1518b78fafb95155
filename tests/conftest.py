"""What every test starts from. The backend is chosen as Keras chooses it: by `KERAS_BACKEND`, TensorFlow without it."""

import os

# These are read once, when TensorFlow, matplotlib and torch are first imported, hence before Keras is.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# Each of the processes that run the tests has a core; torch's threads on models as small as these wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tiny models run once: most of the time of XLA goes into compiling them, and much of that into saving run time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FASTER_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,  # Threads that would wait for one core.
}
os.environ["XLA_FLAGS"] = " ".join(
    [*(f"--{name}={value}" for name, value in FASTER_TO_COMPILE.items()), os.environ.get("XLA_FLAGS", "")]
)

import functools  # noqa: E402
import gc  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402

# Graphs are many objects at once: by default the collector searches them again and again while they grow.
gc.set_threshold(100_000, 10, 10)

# Keras is imported by the fixtures: the process that hands out the tests runs none, and would take its time first.


def pytest_collection_modifyitems(items):
    """Begins with the file that takes longest, beside which the others find a place."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


@pytest.fixture(autouse=True, scope="session")
def compilation():
    """Runs TensorFlow's generation as it stands, where nothing asks for its compilation, which takes most of the time.

    Who asks is a test that is marked `compiled`, for what users get by default, and `jit_compile=True`. What XLA has
    compiled, 60 MB for a model of two small layers, TensorFlow gives back when the process ends. Processes that tests
    start, and SavedModels that these read, are compiled as they are for users.
    """
    import keras

    from keras_transformer.generation import generator

    by_default = {name: getattr(generator, name) for name in ("can_jit", "compile_function")}

    def compile_if_told(function, variables, signature, jit):
        return by_default["compile_function"](function, variables, signature, jit) if jit else function

    with pytest.MonkeyPatch.context() as patch:
        if keras.backend.backend() == "tensorflow":
            patch.setattr(generator, "can_jit", lambda: False)
            patch.setattr(generator, "compile_function", compile_if_told)
        yield by_default


@pytest.fixture(autouse=True, scope="session")
def preparation():
    """Spares what Keras and its backends do before and beside the arithmetic, for programs that run many times.

    Keras and TensorFlow shorten the tracebacks of errors, and look at each call of an operation for it: a sixth of the
    time of tests that trace. Keras collects garbage for each weight that is quantized, here it does not.

    TensorFlow rewrites graphs before their first run, for an eighth of the tests' time; in processes that tests start
    it does. A step that makes the optimizer's variables is traced a second time, which it is not where they are there.
    The datasets that Keras makes of arrays are `untuned`, as this library's are: on busy cores, each may be waited for.
    With each operation of a graph are kept the lines that it comes from, for errors: here all come from one place. The
    kernels of operations that ran are kept too, but one for each name of a variable, and all are forgotten when a seed
    is set: here variables have no name that TensorFlow sees, and a seed leaves the kernels alone. A model that Keras
    exports is traced twice, by Keras and by TensorFlow, and here not a third time for a signature that is left out.

    JAX sets up its compiler's dialects for each program that it lowers: here once.
    """
    import keras

    from keras_transformer.training import allocation

    def delete(layer, name):
        if isinstance(getattr(layer, name), keras.Variable):
            layer._untrack_variable(getattr(layer, name))
        super(keras.Layer, layer).__delattr__(name)

    with pytest.MonkeyPatch.context() as patch:
        keras.config.disable_traceback_filtering()
        patch.setattr(keras.Layer, "__delattr__", delete)
        patch.setattr(allocation, "SETTINGS", {})  # Examples would have a process of many tests keep all it took.
        if keras.backend.backend() == "tensorflow":
            prepare_tensorflow(patch)
        if keras.backend.backend() == "jax":
            from jax._src.interpreters import mlir

            patch.setattr(mlir, "make_ir_context", functools.cache(mlir.make_ir_context))
        yield


def prepare_tensorflow(patch):
    import keras
    import tensorflow as tf
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
    from tensorflow.python.eager.context import Context
    from tensorflow.python.ops import gen_resource_variable_ops
    from tensorflow.python.util import tf_stack

    from keras_transformer.pipelines.batching import untuned

    make_train_function, of_arrays = keras.Model.make_train_function, ArrayDataAdapter.get_tf_dataset
    here, handle = tf_stack.extract_stack(), gen_resource_variable_ops.var_handle_op

    def build_optimizer_first(model, force=False):
        if model.built and model.optimizer is not None and not model.optimizer.built:
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        return make_train_function(model, force)

    def nameless(**options):
        return handle(**{**options, "debug_name": ""})

    def set_global_seed(context, seed):
        context._seed, context._rng = seed, random.Random(seed)

    tf.debugging.disable_traceback_filtering()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    patch.setattr(keras.Model, "make_train_function", build_optimizer_first)
    patch.setattr(keras.Model, "_default_save_signature", None)
    patch.setattr(ArrayDataAdapter, "get_tf_dataset", lambda adapter: untuned(of_arrays(adapter)))
    patch.setattr(tf_stack, "extract_stack", lambda stacklevel=1: here)
    patch.setattr(gen_resource_variable_ops, "var_handle_op", nameless)
    patch.setattr(Context, "_set_global_seed", set_global_seed)


@pytest.fixture(autouse=True)
def generation_as_by_default(request, monkeypatch, compilation):
    from keras_transformer.generation import generator

    if request.node.get_closest_marker("compiled"):
        for name, value in compilation.items():
            monkeypatch.setattr(generator, name, value)


@pytest.fixture(autouse=True)
def reproducible():
    """Fixes the seeds, and takes back the global settings that a test may have changed."""
    import keras

    policy, floatx, epsilon = keras.config.dtype_policy(), keras.config.floatx(), keras.config.epsilon()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_epsilon(epsilon)
    keras.config.set_dtype_policy(policy)


@pytest.fixture(autouse=True, scope="module")
def own_session():
    """Gives each module fresh automatic layer names, and lets go of the graphs that the module before it compiled.

    What is alive then, a million objects of imported packages, is left out of later garbage collections. Keras starts
    one for each session that it clears, which would take half a second.
    """
    import keras

    keras.utils.clear_session()
    gc.freeze()
    yield
    keras.utils.clear_session()
