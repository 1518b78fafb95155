"""What the package promises as a whole: a light import, rooms whose arrows run one way, metadata that agree."""

import ast
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import keras_transformer

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "keras_transformer"

# Which rooms each room may know. Arrows run downward only, so this table has no cycle.
ARROWS = {
    "ops": set(),
    "scopes": {"ops"},
    "layers": {"ops", "scopes"},
    "models": {"layers", "ops", "scopes"},
    "generation": {"models", "layers", "ops", "scopes"},
    "inspection": {"models", "layers", "ops", "scopes"},
    "pretrained": {"generation", "models", "layers", "ops", "scopes"},
    "training": {"models", "layers", "ops", "scopes"},
    "export": set(),
    "distribution": {"training", "models", "layers", "ops", "scopes"},
    "pipelines": {"generation", "pretrained", "training", "models", "layers", "ops", "scopes"},
}
# The one call that reaches up: `Generator.from_pretrained`, which imports what it needs when it is called.
UPWARD = {"generation/generator.py": {"pretrained"}}
# The rooms that run where only one backend and Keras are installed.
CORE = {"ops", "scopes", "layers", "models", "generation", "inspection", "training", "distribution", "export"}

PREFIX = "keras_transformer."
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_id(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, inside_functions):
    """The dotted names that a source file imports, at module level alone or inside functions as well."""
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ("keras_transformer", *path.relative_to(PACKAGE).parent.parts)
                base = ".".join(package[: len(package) - node.level + 1])
                module = f"{base}.{node.module}" if node.module else base
            else:
                module = node.module
            # `from keras_transformer import layers` names the room only in the alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def modules_after(*statements, **environment):
    """The modules that a fresh interpreter holds after each of the statements that it runs."""
    code = "import sys, json\nfound = []\n"
    code += "".join(f"{statement}\nfound.append(sorted(sys.modules))\n" for statement in statements)
    code += "print(json.dumps(found))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [set(names) for names in json.loads(result.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def loaded():
    """What there is after importing Keras and numpy, then the package, and then asking it for its pipelines."""
    return modules_after("import keras, numpy", "import keras_transformer", "keras_transformer.pipelines")


def test_import_adds_only_the_package_to_keras_and_numpy(loaded):
    added = loaded[1] - loaded[0]
    foreign = {name for name in added if name.partition(".")[0] not in {*sys.stdlib_module_names, "keras_transformer"}}
    assert "keras_transformer.layers" in added
    assert not foreign


@pytest.mark.parametrize("backend, others", [("jax", {"tensorflow", "torch"}), ("torch", {"tensorflow", "jax"})])
def test_import_needs_one_backend_only(backend, others):
    # A finder that does not find the other backends, as if they were not installed.
    without_others = f"""
from importlib.machinery import PathFinder
class WithoutOthers(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {others!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOthers
import keras_transformer
"""
    (loaded,) = modules_after(without_others, KERAS_BACKEND=backend)
    assert "keras_transformer.generation" in loaded
    assert not others & loaded


def test_pipelines_are_reached_through_the_package_but_loaded_late(loaded):
    assert "keras_transformer.pipelines" not in loaded[1]
    assert "keras_transformer.pipelines" in loaded[2]
    assert "pipelines" in dir(keras_transformer)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_room"):
        keras_transformer.no_such_room  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_arrows_run_downward(path):
    room = room_of(path)
    if room == "__init__":
        allowed = set(ARROWS)
    else:
        allowed = ARROWS[room] | {room}
    at_import = {name.split(".")[1] for name in imports(path, inside_functions=False) if name.startswith(PREFIX)}
    assert at_import <= allowed, f"{module_id(path)} imports {sorted(at_import - allowed)}"
    allowed = allowed | UPWARD.get(module_id(path), set())
    known = {name.split(".")[1] for name in imports(path, inside_functions=True) if name.startswith(PREFIX)}
    assert known <= allowed, f"{module_id(path)} knows {sorted(known - allowed)}; {room} may know {sorted(allowed)}"


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) in CORE], ids=module_id)
def test_core_imports_keras_and_numpy_alone(path):
    top_level = {name.partition(".")[0] for name in imports(path, inside_functions=False)}
    assert top_level <= {*sys.stdlib_module_names, "keras", "numpy", "keras_transformer"}


def test_every_room_is_on_the_map():
    rooms = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert rooms <= set(ARROWS)


def test_version_is_the_one_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("keras-transformer-layers") == project["version"]
    assert keras_transformer.__version__ == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
