"""W&B artifacts to folders: what the manifest says is checked before anything is fetched, what came is
checked after it.

It knows nothing about formats.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import DyloraMoeError, FailureError, InputError, one_line
from ..extras import how_to_install
from ..staging import staged_folder
from .hub_errors import without


def fetch_artifact(name: str, token: str | None = None) -> Any:
    """The SDK's object for an artifact, its manifest checked. Nothing of its content is here yet. In
    `wandb_errors`.

    Raises:
        InputError: a bad name; no key; no such artifact; a manifest with a path that leaves the folder.
    """
    artifact = connect(token).artifact(str(parse_name(name, version=True)))
    check_manifest(artifact.manifest.entries, name)
    return artifact


def check_manifest(entries: dict[str, Any], name: str) -> None:
    """No path leaves the folder or hides another, and nothing is taken from elsewhere: not from this
    machine's own files (`file://`), and not from addresses that whoever made the artifact chose.

    Raises:
        InputError: names the first such entry.
    """
    if not entries:
        raise InputError(f"{name} holds no files")
    taken: set[str] = set()
    for path, entry in entries.items():
        parts = str(path).split("/")
        unsafe = any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\0-\x1f]", str(path))
        if unsafe or str(entry.path) != str(path):
            raise InputError(
                f"{name} holds a file with the path {str(path)!r}, which is not one inside a folder; refused"
            )
        if entry.ref is not None:
            raise InputError(
                f"{name} holds {path} as a reference to {entry.ref}, and not the file itself; refused"
            )
        taken.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    for path in entries:
        if str(path) in taken:
            raise InputError(f"{name} holds {path} both as a file and as a folder; refused")


def download_to(artifact: Any, folder: Path, name: str) -> list[str]:
    """Fetch everything into an empty folder and compare it with the manifest. Returns the paths. In
    `wandb_errors`.

    Raises:
        FailureError: a file is missing or differs from what the manifest promises.
    """
    # not skip_cache=True: the SDK (0.31) keeps that path in an object that its threads share, and mixes files
    # up
    with wandb_errors(name):  # else a lost connection, an OSError too, would be taken for a full disk
        artifact.download(root=str(folder))
    entries = artifact.manifest.entries
    found = set()
    for directory, folders, files in os.walk(folder):
        for path in (Path(directory, name) for name in [*folders, *files]):
            if path.is_symlink():
                raise FailureError(f"{name}: {path.relative_to(folder)} came as a link; refused")
        found |= {Path(directory, file).relative_to(folder).as_posix() for file in files}
    if found != set(map(str, entries)):
        wrong = sorted(found ^ set(map(str, entries)))
        raise FailureError(f"{name}: what came differs from the manifest: {', '.join(wrong[:3])}")
    for path, entry in entries.items():
        if _digest(folder / path, entry) != entry.digest:
            raise FailureError(
                f"{name}: {path} differs from what the manifest promises; if it happens again, empty the SDK's cache "
                "with `wandb artifact cache cleanup 0B`"
            )
    return sorted(found)


def _digest(path: Path, entry: Any) -> str:
    if (entry.extra or {}).get("alg", "MD5") != "MD5":
        from wandb.sdk.lib.hashutil import xxh128_file_b64  # newer servers may ask for it

        return xxh128_file_b64(str(path))
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return base64.b64encode(digest.digest()).decode()


def download_artifact(artifact: str, *, token: str | None = None) -> Path:
    """The folder of a W&B artifact, in a cache: complete or absent, and fetched once for each content.

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


def cached(artifact: Any, name: str) -> Path:
    """As `download_artifact`, of an artifact whose manifest was checked. In `wandb_errors`."""
    # The digest stands for paths and contents, whatever alias was asked for; hashed, it is safe as a folder's
    # name.
    parts = parse_name(name, version=True)
    key = hashlib.sha256(
        f"{parts.entity}/{parts.project}/{parts.name} {artifact.digest}".encode()
    ).hexdigest()[:32]
    folder = cache_folder() / key / re.sub(r"[^\w.-]", "_", parts.name)
    if not _is_complete(folder, artifact.manifest.entries):
        # whatever is there was damaged after it had been put there complete
        with staged_folder(folder, overwrite=True, is_replaceable=lambda _: True) as content:
            download_to(artifact, content, name)
    return folder


def cache_folder() -> Path:
    from wandb import env

    return Path(env.get_cache_dir()) / "dylora-moe"


def _is_complete(folder: Path, entries: dict[str, Any]) -> bool:
    try:
        return all((folder / path).lstat().st_size == entry.size for path, entry in entries.items())
    except OSError:
        return False


PREFIX = "wandb:"
TIMEOUT = 30  # seconds for the SDK's calls; file transfers take what they take
NOT_INSTALLED = f"W&B needs the wandb SDK, which is not installed: {how_to_install('wandb')}"
LOGIN = "log in with `wandb login`, or set WANDB_API_KEY"
NAME = re.compile(r"(?!\.{1,2}$)[^/\\#?%:\s\0-\x1f][^/\\#?%:\r\n\0-\x1f]{0,127}")


class ArtifactName(NamedTuple):
    entity: str
    project: str
    name: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}" + (f":{self.version}" if self.version else "")


def parse_name(text: str, version: bool) -> ArtifactName:
    """`entity/project/name:version` in parts; a leading `wandb:` is left off. A version is a number (v3) or
    an alias.

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


def sdk() -> Any:
    """The wandb module.

    Raises:
        InputError: it is not installed.
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
    return wandb


def connect(token: str | None = None) -> Any:
    """A `wandb.Api` whose credentials were accepted. Call it inside `wandb_errors`.

    Raises:
        InputError: there is no API key, where the SDK itself would ask for one.
        FailureError: no server answers.
    """
    wandb = sdk()
    check_ready(wandb, token)
    return wandb.Api(timeout=TIMEOUT, **({"api_key": token} if token else {}))


def check_ready(wandb: Any, token: str | None = None) -> None:
    """There are credentials, and there is somebody to show them to. The SDK waits long where this does
    not."""
    url = base_url(wandb)
    if not token and not _has_credentials(url):
        raise InputError(f"no W&B API key on this machine; {LOGIN}")
    address = urlsplit(url)
    if urllib.request.getproxies().get(address.scheme):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise FailureError(f"{url} cannot be reached ({one_line(error)}); is there a network?") from None


def mode(wandb: Any) -> str:
    """Where a run would go: "online", "offline", "dryrun" (an older word for that) or "disabled"."""
    return os.environ.get("WANDB_MODE") or wandb.setup().settings.mode or "online"


def base_url(wandb: Any) -> str:
    return os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url


def _has_credentials(url: str) -> bool:
    """What the SDK finds without asking anybody."""
    try:
        from wandb.sdk.lib import wbauth

        # no public call looks without prompting
        return (
            wbauth.authenticate_session(host=url, source="dylora-moe", prompt=False, update_session=False)
            is not None
        )
    except (ImportError, TypeError):
        return _has_credentials_of_old(url)


def _has_credentials_of_old(url: str) -> bool:
    """The places that the SDK documents, for versions of it without the call above."""
    import netrc

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(urlsplit(url).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return bool(getattr(sdk().setup().settings, "api_key", None))


@contextmanager
def wandb_errors(artifact: str, token: str | None = None) -> Iterator[None]:
    """Errors of the SDK and of the network as `InputError` or `FailureError`, one clear line each."""
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
