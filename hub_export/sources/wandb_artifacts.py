"""W&B artifacts as folders, by the wandb SDK.

An artifact may come from anyone: what its manifest says is checked before anything is fetched, and the SDK
compares every file that came with the manifest's digest.
"""

from __future__ import annotations

import configparser
import hashlib
import netrc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import DyloraMoeError, FailureError, InputError, few, one_line
from ..extras import how_to_install
from ..staging import staged_folder
from .hub_errors import without


PREFIX = "wandb:"
NOT_INSTALLED = f"W&B needs the wandb SDK, which is not installed: {how_to_install('wandb')}"
LOGIN = "log in with `wandb login`, or set WANDB_API_KEY"
# What `wandb init`, `wandb online` and `wandb offline` write into a folder's settings.
OF_A_FOLDER = {"entity", "project", "mode"}
OWN_SERVER = "https://api.wandb.ai"  # of W&B, which older releases wrote there, too
NAME = re.compile(r"(?!\.{1,2}$)[^/\\#?%:\s\0-\x1f][^/\\#?%:\r\n\0-\x1f]{0,127}")


class ArtifactName(NamedTuple):
    entity: str
    project: str
    name: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}" + (f":{self.version}" if self.version else "")


def parse_name(text: str, version: bool) -> ArtifactName:
    """Split `entity/project/name:version`; a leading `wandb:` is left off. A version is a number (v3) or an alias.

    Raises:
        InputError: it has another form, or a version where there must be none, or none where there must be
            one.
    """
    form = "entity/project/name" + (":version" if version else "")
    parts = text.removeprefix(PREFIX).split("/")
    if len(parts) != 3:
        raise InputError(f"{text!r} is not an artifact's name; it has the form {form}")
    name, colon, tag = parts[2].partition(":")
    if version and not tag:
        raise InputError(
            f"{text!r} names no version; write {form} (version: v0, v1, … or an alias such as latest)"
        )
    if colon and not version:
        raise InputError(f"{text!r} names a version, which W&B gives by itself; write {form}")
    if not all(NAME.fullmatch(part) for part in [*parts[:2], name, *([tag] if version else [])]):
        raise InputError(f"{text!r} is not an artifact's name; it has the form {form}")
    return ArtifactName(parts[0], parts[1], name, tag or None)


def download_artifact(artifact: str, *, token: str | None = None) -> Path:
    """Fetch a W&B artifact into a cache, once for each content; it is there complete, or not at all.

    Args:
        artifact: `entity/project/name:version`, with or without a leading `wandb:`.
        token: an API key, otherwise what the SDK finds (WANDB_API_KEY, `wandb login`).

    Returns:
        A folder with the artifact's own name, below $WANDB_CACHE_DIR or the SDK's cache.

    Raises:
        InputError: the SDK is not installed; a bad name; no API key, or one that is not accepted; no such
            artifact; one whose paths leave the folder.
        FailureError: no network; damaged files; a full disk.
    """
    parse_name(artifact, version=True)
    with wandb_errors(artifact, token):
        return cached(fetch_artifact(artifact, token), artifact)


def fetch_artifact(name: str, token: str | None = None) -> Any:
    """Get the SDK's object for an artifact, its manifest checked; nothing of its content is fetched.

    Call it inside `wandb_errors`.

    Raises:
        InputError: a bad name; no key; no such artifact; a manifest with a path that leaves the folder.
    """
    artifact = connect(token).artifact(str(parse_name(name, version=True)))
    check_manifest(artifact.manifest.entries, name)
    return artifact


def check_manifest(entries: dict[str, Any], name: str) -> None:
    """Check that every path stays inside the folder, and that every entry is a file of the artifact's own.

    A reference would be taken from this machine's files (`file://`), or from an address that the artifact's
    maker chose.

    Raises:
        InputError: names the first entry that is not such a file.
    """
    if not entries:
        raise InputError(f"{name} holds no files")
    for path, entry in entries.items():
        leaves = any(part in ("", ".", "..") for part in str(path).split("/"))
        if leaves or re.search(r"[\\:\0-\x1f]", str(path)):
            raise InputError(
                f"{name} holds a file with the path {str(path)!r}, which is not one inside a folder; refused"
            )
        if entry.ref is not None:
            raise InputError(
                f"{name} holds {path} as a reference to {entry.ref}, and not the file itself; refused"
            )


def download_to(artifact: Any, folder: Path, name: str) -> None:
    """Fetch an artifact's files into an empty folder, and compare them with the manifest.

    Raises:
        FailureError: the files cannot be had, or one differs from what the manifest promises.
    """
    with wandb_errors(name):  # a lost connection, an `OSError` too, must not be taken for a full disk
        artifact.download(root=str(folder))
        try:
            artifact.verify(root=str(folder))
        except ValueError as error:
            raise FailureError(
                f"{name} differs from what the manifest promises: {one_line(error)}; if it happens again, empty the "
                "SDK's cache with `wandb artifact cache cleanup 0B`"
            ) from None


def cached(artifact: Any, name: str) -> Path:
    """Download as `download_artifact` does, the manifest being checked. Call it inside `wandb_errors`."""
    from wandb import env

    # The digest stands for paths and contents, whatever alias was asked for; hashed, it is safe as a folder's
    # name.
    parts = parse_name(name, version=True)
    key = f"{parts.entity}/{parts.project}/{parts.name} {artifact.digest}"
    place = Path(env.get_cache_dir()) / "dylora-moe" / hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = place / re.sub(r"[^\w.-]", "_", parts.name)
    if not folder.is_dir():
        # another process may put the same there meanwhile
        with staged_folder(folder, overwrite=True, is_replaceable=lambda _: True) as content:
            download_to(artifact, content, name)
    return folder


def sdk() -> Any:
    """Import wandb, and check the settings file of the working folder before the SDK reads it.

    Raises:
        InputError: it is not installed; that file sets what could send the API key elsewhere.
    """
    try:
        import wandb
    except ImportError as error:
        # a module that the SDK itself lacks is another matter
        missing = (error.name or "wandb").split(".")[0]
        raise InputError(
            NOT_INSTALLED if missing == "wandb" else f"the wandb SDK cannot be imported: {one_line(error)}"
        ) from None
    if not hasattr(
        wandb, "Api"
    ):  # a folder `wandb/`, which runs leave behind, is importable as an empty package
        raise InputError(NOT_INSTALLED)
    _check_folder_settings(Path(wandb.Settings().settings_workspace), wandb)
    return wandb


def _check_folder_settings(path: Path, wandb: Any) -> None:
    """Refuse settings that could send the API key elsewhere: a server, a proxy, headers.

    The SDK reads `wandb/settings` in the working folder, which may be a downloaded one. What its own commands
    write there is taken; `wandb login --host` writes a server of one's own to `~/.config/wandb/settings`.

    Raises:
        InputError: names the settings.
    """
    if not path.exists():
        return
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        found = dict(parser.items("default")) if parser.has_section("default") else {}
    except (OSError, ValueError, configparser.Error) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}; remove it") from None
    if os.environ.get("WANDB_BASE_URL") or found.get("base_url") in (wandb.Settings().base_url, OWN_SERVER):
        found.pop("base_url", None)
    others = sorted(found.keys() - OF_A_FOLDER)
    if others:
        raise InputError(
            f"{path} sets {few(others)}, by which the maker of this folder could have the API key sent elsewhere; take "
            "it out, or run the command in another folder (a server of your own: `wandb login --host`, or "
            "WANDB_BASE_URL)"
        )


def check_credentials(token: str | None = None) -> Any:
    """Import wandb, and check that there is an API key, without asking W&B about it.

    Raises:
        InputError: as `sdk`, or there is no API key, where the SDK itself would ask for one.
    """
    wandb = sdk()
    if not token and not _has_credentials(wandb):
        raise InputError(f"no W&B API key on this machine; {LOGIN}")
    return wandb


def connect(token: str | None = None) -> Any:
    """Make a `wandb.Api` whose credentials were accepted. Call it inside `wandb_errors`.

    Raises:
        InputError: as `check_credentials`.
    """
    wandb = check_credentials(token)
    return wandb.Api(**({"api_key": token} if token else {}))


def mode(wandb: Any) -> str:
    """Return W&B's mode: "online", "offline", "dryrun" (an older word for that) or "disabled"."""
    return os.environ.get("WANDB_MODE") or wandb.setup().settings.mode or "online"


def _has_credentials(wandb: Any) -> bool:
    """Look into the places that the SDK documents; it has no public call that looks without prompting."""
    settings = wandb.setup().settings
    given = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE"), settings.api_key)
    if any(given):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.base_url).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


@contextmanager
def wandb_errors(artifact: str, token: str | None = None) -> Iterator[None]:
    """Turn errors of the SDK and of the network into `InputError` or `FailureError`, one line each."""
    try:
        yield
    except DyloraMoeError:
        raise
    except Exception as error:  # the SDK raises many kinds, ValueError among them
        raise _explained(error, artifact, token) from None


def _explained(error: Exception, artifact: str, token: str | None) -> DyloraMoeError:
    said = one_line(error)
    for secret in (token, os.environ.get("WANDB_API_KEY")):
        said = without(secret, said)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    lower = said.lower()
    if "did not respond in time" in lower or "deadline exceeded" in lower:
        return FailureError(f"W&B does not answer, or fails ({said}); try again later")
    if "AuthenticationError" in kinds:
        return InputError(f"W&B does not accept this API key ({said}); {LOGIN}")
    if "CommError" in kinds and "not found" in lower:
        return InputError(f"W&B has no artifact {artifact}, or this API key may not see it ({said})")
    if "CommError" in kinds and any(word in lower for word in ("403", "permission", "forbidden")):
        return InputError(f"this API key may not use {artifact} ({said})")
    if "UsageError" in kinds:
        return InputError(f"{artifact}: {said}")
    return FailureError(f"{artifact}: {type(error).__name__}: {said}")
