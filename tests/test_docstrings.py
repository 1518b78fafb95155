"""Every public name says what it does, and every example in a docstring runs as it stands."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import numpy as np
import pytest

import keras_transformer

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def public_modules():
    modules = pkgutil.walk_packages(keras_transformer.__path__, "keras_transformer.")
    names = [module.name for module in modules if not any(part.startswith("_") for part in module.name.split("."))]
    return ["keras_transformer", *names]


def public_names(module):
    """The package's own classes and functions in the public namespace of `module`."""
    exported = getattr(module, "__all__", None)
    for name, value in vars(module).items():
        public = not name.startswith("_") if exported is None else name in exported
        ours = getattr(value, "__module__", "").startswith("keras_transformer")
        if public and ours and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


@pytest.mark.parametrize("module_name", public_modules())
def test_examples_run(module_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_name)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    report = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module_name):
        # An example starts from the names a reader would have imported, not from all that the module itself imports.
        names = dict(public_names(module))
        test.globs = {"keras": keras, "np": np, "kt": keras_transformer, **names, "__name__": "__main__"}
        keras.utils.set_random_seed(0)
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("room", [name for name in public_modules() if name.count(".") == 1])
def test_public_names_are_documented(room):
    # What a room exports is what people import; the modules inside it are where that is kept.
    module = importlib.import_module(room)
    assert (module.__doc__ or "").strip(), f"{room} has no docstring"
    names = dict(public_names(module))
    assert names, f"{room} exports nothing"
    missing = [name for name, value in names.items() if not (value.__doc__ or "").strip()]
    assert not missing, f"{room}: no docstring on {missing}"
    without = [name for name, value in names.items() if ">>>" not in value.__doc__]
    assert not without, f"{room}: no example in the docstring of {without}"
