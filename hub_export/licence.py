"""The foundation's licence, as its own model card states it. It knows nothing about what licences mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .foundation import is_local
from .mixture import FoundationReference, Mixture


@dataclass(frozen=True)
class Licence:
    """The fields of a model card's metadata (https://huggingface.co/docs/hub/repositories-licenses)."""

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @property
    def text(self) -> str:
        return self.license_name or self.license


def foundation_licence(reference: FoundationReference) -> Licence | None:
    """What the foundation's README.md says, or None where it says nothing or cannot be had.

    A missing licence is no reason to stop: the card then says that the foundation's applies, without its name.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if reference.name is None:
        return None
    try:
        if is_local(reference):
            path = Path(reference.name) / "README.md"
        else:
            path = Path(hf_hub_download(reference.name, "README.md", revision=reference.revision))
        data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None
    return _of_card(data)


def stored_licence(mixture: Mixture) -> Licence | None:
    """What the card of an exported repo states, for when the foundation's own is not at hand."""
    from huggingface_hub import ModelCard

    path = mixture.folders[0] / "README.md"
    if mixture.routing_strategy is None or not path.is_file():
        return None
    try:
        return _of_card(ModelCard.load(path, ignore_metadata_errors=True).data)
    except (OSError, ValueError):
        return None


def _of_card(data: Any) -> Licence | None:
    license = getattr(data, "license", None)
    if not isinstance(license, str):
        return None
    texts = [value if isinstance(value, str) else None for value in (data.license_name, data.license_link)]
    return Licence(license, *texts)
