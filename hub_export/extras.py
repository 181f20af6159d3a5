"""The optional packages, and which extra of this package brings each.

A missing one is named before any work begins.
"""

from __future__ import annotations

import importlib

from .errors import InputError, one_line


EXTRAS = {
    "evalplus": "eval",
    "gradio": "explore",
    "jinja2": "eval",
    "matplotlib": "eval",
    "scipy": "eval",
    "vllm": "vllm",
    "wandb": "wandb",
}
REPORT = ("evalplus", "jinja2", "matplotlib", "scipy")  # what scores, tables, figures and the page take


def check_packages(*names: str) -> None:
    """Import optional packages, or say how to install them.

    Args:
        names: of `EXTRAS`.

    Raises:
        InputError: names all that are missing, with the command that installs them; or one that is there and
            broken.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in missing))
        raise InputError(
            f"this needs {', '.join(missing)}, which {verb} not installed: {how_to_install(extras)}"
        )


def how_to_install(extra: str) -> str:
    """Give the command that installs an extra, from an index and from a clone."""
    return f"pip install 'dylora-moe[{extra}]', or in a clone: pip install -e '.[{extra}]'"


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError as error:
        is_there = error.name is not None and error.name.split(".")[0] != name  # and lacks something itself
        if is_there:
            raise InputError(f"{name} cannot be imported: {one_line(error)}") from error
        return False
    return True
