"""Settings of the documentation: `python -m sphinx -W docs DIRECTORY` builds it."""

import inspect
import os
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402

import keras_transformer  # noqa: E402

project = "keras_transformer"
author = "the keras_transformer authors"
copyright = author
release = version = keras_transformer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# The chapters run as they are built, and an assertion that fails is the end of it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "remove"
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

html_theme = "furo"
html_title = f"keras_transformer {release}"
html_static_path = ["static"]
html_css_files = ["tables.css"]

# Docstrings are written as those of Keras are: single backticks are code, sections are Google's.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Call arguments", "params_style"), "Reference", "References"]
napoleon_use_rtype = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"


def markdown_to_rst(app, what, name, object, options, lines):
    """Turns the two pieces of Markdown that docstrings use, links and fenced code, into reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(r"\[([^\]]+)\]\s*\((https?://[^)\s]+)\)", lambda m: f"`{' '.join(m[1].split())} <{m[2]}>`__", text)
    text = re.sub(
        r"^( *)```\w*\n(.*?)^ *```$",
        lambda m: f"{m[1]}.. code-block:: python\n\n" + re.sub(r"^(?=.)", "    ", m[2], flags=re.M),
        text,
        flags=re.M | re.S,
    )
    lines[:] = text.split("\n")


def skip_plumbing(app, what, name, object, skip, options):
    """Leaves out what every Keras layer has: a reader of the API wants to know what this one does differently."""
    if inspect.isfunction(object) and name in {"build", "get_config", "compute_output_shape", "compute_output_spec"}:
        return True
    # The fields of named tuples stand in their docstrings already.
    return True if type(object).__name__ == "_tuplegetter" else skip


def signature_of_init(app, what, name, object, options, signature, return_annotation):
    """Shows the arguments that a layer takes: Keras gives every layer a `__new__` that hides them."""
    if what == "class" and issubclass(object, keras.layers.Layer):
        parameters = list(inspect.signature(object.__init__).parameters.values())[1:]
        return str(inspect.Signature(parameters)), None
    return signature, return_annotation


def setup(app):
    # Before napoleon, which has the default priority of 500 and would take the links' colons apart.
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
    app.connect("autodoc-process-signature", signature_of_init)
    app.connect("autodoc-skip-member", skip_plumbing)
