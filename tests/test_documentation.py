"""The code in the README and the documentation runs as it is printed: each page's blocks in order, in one namespace."""

import ast
import importlib.util
import io
import pathlib
import pkgutil
import re
import tokenize
import tomllib

import numpy as np
import pytest

import keras_transformer
from keras_transformer.pretrained.family import FAMILIES

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<marker><!-- not run: (?P<reason>.*?) -->\n+)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
# What is run as it is by default: beam search, greedy search, and what a pipeline exports.
COMPILED = ("README.md", "docs/saving.md")
COMMANDS = [
    'pip install -e ".[examples]" && python examples/translation.py',
    'pip install -e ".[test]" && pytest',
]


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """The line number, code and reason for not being run of each fenced block of one language."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        if match["language"].strip() == language:
            yield text.count("\n", 0, match.start("code")), match["code"], match["reason"]


def has_code(path):
    return any(reason is None for _, _, reason in blocks(path, "python"))


def shown_values(code):
    """By line, what the comments say that have nothing but a Python value in them."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            try:
                yield token.start[0], ast.literal_eval(token.string.strip("# "))
            except (SyntaxError, ValueError):
                continue


def run(code, path, namespace):
    """Runs a block. An expression that stands for itself, with a value as its comment, must have that value."""
    shown = dict(shown_values(code))
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr) and statement.end_lineno in shown:
            value = eval(compile(ast.Expression(statement.value), str(path), "eval"), namespace)
            expected = shown[statement.end_lineno]
            assert np.array_equal(value, expected), f"{page_id(path)}:{statement.lineno} is {value}, not {expected}"
        else:
            exec(compile(ast.Module([statement], []), str(path), "exec"), namespace)


def with_code():
    for path in PAGES:
        if has_code(path):
            yield pytest.param(path, marks=[pytest.mark.compiled] * (page_id(path) in COMPILED), id=page_id(path))


@pytest.mark.parametrize("path", with_code())
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, reason in blocks(path, "python"):
        if reason is None:
            # Leading blank lines make the line numbers of a traceback those of the page.
            run("\n" * line + code, path, namespace)


def test_values_that_pages_show_are_checked():
    page = PAGES[0]
    run("x = (1, 2)\nx  # (1, 2)\nx  # a pair: (3, 4)\nx[0]\n", page, {})
    for wrong in ("x = (1, 2)\nx  # (1, 3)\n", "(1.5 +\n 1)  # 2.0\n"):
        with pytest.raises(AssertionError, match=r"README.md:\d is .*, not"):
            run(wrong, page, {})


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_code_that_is_not_run_is_valid_and_says_why(path):
    for line, code, reason in blocks(path, "python"):
        compile("\n" * line + code, str(path), "exec")
        assert reason is None or len(reason.split()) >= 4, f"{page_id(path)}:{line} is left out without a reason"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_commands_each_on_its_own_line(command):
    code = "".join(code for _, code, _ in blocks(ROOT / "README.md", "bash"))
    assert command in code.splitlines()


def test_every_room_has_an_api_page():
    rooms = {module.name for module in pkgutil.iter_modules(keras_transformer.__path__)}
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: keras_transformer\.(\w+)", pages))
    assert documented == rooms


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), f"{page_id(path)} links to {target}, which is not there"


@pytest.fixture(scope="module")
def families_table():
    path = ROOT / "docs" / "families_table.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_families_are_read_off_the_models(families_table):
    text = families_table.PAGE.read_text()
    assert families_table.written(text) == text, "stale tables: run `python docs/families_table.py`"


def test_every_family_has_a_page_and_a_row(families_table):
    # The encoders of CLIP are families of their own, and stand on its page.
    families = {kind for kind in FAMILIES if kind not in ("clip_text_model", "clip_vision_model")}
    pages = {path.stem for path in (ROOT / "docs" / "families").glob("*.md")} - {"index", "arguments"}
    assert pages == families == {page for page, *_ in families_table.MODELS}


def test_extras_named_in_the_documentation_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for path in PAGES for extra in re.findall(r'-e "\.\[(\w+)\]"', path.read_text())}
    assert {"examples", "test", "docs"} <= named <= set(extras)
