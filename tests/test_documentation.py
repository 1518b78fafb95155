"""The code in the README and the documentation runs as it is printed: each page's blocks in order, in one namespace."""

import pathlib
import pkgutil
import re
import tomllib

import pytest

import keras_transformer

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<marker><!-- not run: (?P<reason>.*?) -->\n+)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
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


@pytest.mark.parametrize("path", [path for path in PAGES if has_code(path)], ids=page_id)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, reason in blocks(path, "python"):
        if reason is None:
            # Leading blank lines make the line numbers of a traceback those of the page.
            exec(compile("\n" * line + code, str(path), "exec"), namespace)


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


def test_extras_named_in_the_documentation_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for path in PAGES for extra in re.findall(r'-e "\.\[(\w+)\]"', path.read_text())}
    assert {"examples", "test", "docs"} <= named <= set(extras)
