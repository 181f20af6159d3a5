"""Puts a repo's weights and settings beside this package's modeling code, to run them without the repo's own.

Left behind is what makes transformers run a folder's code: its Python files, `auto_map`, `custom_generate/`,
an adapter's config that names another model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..sources.source_folder import SourceFolder, open_folder


LINKED = re.compile(
    r"[^/]+\.safetensors|model\.safetensors\.index\.json|generation_config\.json|experts/[^/]+/[^/]+\.safetensors"
)


def link_with_own_code(repo: Path | SourceFolder, folder: Path) -> None:
    """Fill an empty folder with links to a repo's weights, its config cleared of other code, and our code.

    Raises:
        InputError: a file of the repo lies elsewhere.
    """
    from dylora_moe.modeling.configuration_dylora_moe import without_code_elsewhere
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP, save_code

    source = open_folder(repo)
    for name in filter(LINKED.fullmatch, source.files()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((source / name).resolve())
    config = without_code_elsewhere(source.read_json("config.json"))
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    save_code(folder)
