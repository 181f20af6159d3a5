"""The folder of a Space: `app.py`, the page's own files beside it, what they require, and the card.

A Space installs nothing of this package: the page's files are copied as they are, and import torch, transformers and
Gradio alone. Fields of the card: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.repo_config import load_config
from dylora_moe.hub_export.sources.hub_and_folders import is_hub_id, is_on_hub
from dylora_moe.hub_export.sources.hub_errors import hub_errors
from dylora_moe.hub_export.sources.source_folder import exists
from dylora_moe.hub_export.staging import check_output, staged_folder

from .options import ExploreOptions


EVAL = Path(__file__).parents[1]
# By their place below `eval/`, and, in a Space, below `page/`.
COPIED = (
    "explore/completion.py",
    "explore/page.py",
    "explore/routing.py",
    "explore/shown.py",
    "explore/sides.py",
    "explore/space_app.py",
    "explore/strategies.py",
    "explore/streaming.py",
    "report/palette.py",
)
PACKAGES = ("page", "page/explore", "page/report")
GRADIO, PYTHON = "6.31.0", "3.12"  # the versions that a Space gets
REQUIREMENTS = ("accelerate>=1.3", "torch>=2.7", "transformers>=5.10")
APP = '''"""{repo} to look at: its completions, coloured by expert. Written by `dylora-moe explore --space`."""

from page.explore.space_app import serve


serve({repo!r}, revision={revision!r}, dtype={dtype!r})
'''
CARD = """---
{fields}---

# {repo}, coloured by expert

Type a prompt: every token of the completion has the colour of the LoRA expert that leads there. Two routing strategies
stand beside each other. The model is [{repo}](https://huggingface.co/{repo}), and runs with its own code.
"""


@dataclass
class SpaceResult:
    """A Space's folder, with the Hub id that its `app.py` loads."""

    output_dir: Path
    repo: str
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "output_dir": str(self.output_dir)}


def write_space(repo: str, output_dir: str | Path, **options: Any) -> SpaceResult:
    """Write the folder of a Space that shows a repo on the Hub.

    Args:
        repo: the Hub id, `org/name`.
        output_dir: missing or empty.
        options: `revision` and `dtype` of `ExploreOptions`.

    Raises:
        InputError: the repo is not on the Hub or no mixture, an option of a page on this machine, or the folder is
            not empty; nothing was written.
        FailureError: the Hub cannot be reached, or the folder cannot be written.
    """
    chosen = ExploreOptions(**options)
    chosen.check_for_space()
    _check_hub_id(repo)
    final = check_output(Path(output_dir), False, lambda folder: False)
    config = _config_on_hub(repo, chosen.revision)
    base = config.base_model_name_or_path
    models = [repo, *([base] if is_on_hub(base) else [])]
    with staged_folder(final, False, lambda folder: False) as folder:
        _copy_page(folder)
        app = APP.format(repo=repo, revision=chosen.revision, dtype=chosen.dtype)
        (folder / "app.py").write_text(app, encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(repo, models), encoding="utf-8")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return SpaceResult(final, repo, files)


def card(repo: str, models: list[str]) -> str:
    """Write a Space's README with the fields that the Hub reads."""
    fields = {
        "title": repo.rpartition("/")[2],
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "models": models,
    }
    return CARD.format(fields=yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), repo=repo)


def _check_hub_id(repo: str) -> None:
    if exists(repo):
        raise InputError(
            f"{repo} is a folder, and a Space loads a repo from the Hub: `dylora-moe push {repo} ORG/NAME`, then pass "
            "ORG/NAME"
        )
    if not is_hub_id(repo) or "/" not in repo:
        raise InputError(f"{repo} is no Hub id; a Space loads a repo from the Hub, ORG/NAME")


def _config_on_hub(repo: str, revision: str | None) -> Any:
    """Load the config of a repo on the Hub, and nothing else of it."""
    with hub_errors(repo):
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(repo, "config.json", revision=revision)
    return load_config(Path(file).parent)


def _copy_page(folder: Path) -> None:
    for package in PACKAGES:
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    for file in COPIED:
        shutil.copyfile(EVAL / file, folder / "page" / file)


__all__ = ["COPIED", "GRADIO", "SpaceResult", "card", "write_space"]
