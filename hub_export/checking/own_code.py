"""A repo's weights and settings under this package's code: what it computes, without running anything that it
brings.

Whatever of a folder makes transformers run code (its Python files, `auto_map`, `custom_generate/`, an
adapter's config that names another model) is left behind. It knows which files a repo is loaded from, and
nothing about what they hold.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..tensors.containment import contained
from ..tensors.tensor_files import read_json


LINKED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "experts/*/*.safetensors",
)


def link_with_own_code(repo: Path, folder: Path) -> None:
    """Fill an empty folder with links to the repo's weights, its config without what names other code, and
    this package's code.

    Raises:
        InputError: a file of the repo lies elsewhere.
    """
    from dylora_moe.modeling.configuration_dylora_moe import without_code_elsewhere
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP, save_code

    for path in sorted(path for pattern in LINKED for path in repo.glob(pattern)):
        link = folder / path.relative_to(repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(contained(repo, path).resolve())
    config = without_code_elsewhere(read_json(contained(repo, repo / "config.json")))
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    save_code(folder)
