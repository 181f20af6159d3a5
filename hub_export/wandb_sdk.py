"""The wandb SDK, which is optional: imported when it is used, never left to prompt, its errors in one line each.

It knows nothing about what an artifact holds. No API key is ever part of a message, and no exception of the SDK's
network library, which may quote the request with its headers, is kept as a cause.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .errors import DyloraMoeError, FailureError, InputError, one_line
from .extras import how_to_install
from .hub_errors import without


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
    """`entity/project/name:version` in parts; a leading `wandb:` is left off. A version is a number (v3) or an alias.

    Raises:
        InputError: it has another form, or a version where there must be none, or none where there must be one.
    """
    form = "entity/project/name" + (":version" if version else "")
    parts = text.removeprefix(PREFIX).split("/")
    if len(parts) != 3:
        raise InputError(f"{text!r} is not an artifact's name; it has the form {form}")
    name, colon, tag = parts[2].partition(":")
    if version and not tag:
        raise InputError(f"{text!r} names no version; write {form} (version: v0, v1, … or an alias such as latest)")
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
    if not hasattr(wandb, "Api"):  # a folder `wandb/`, which runs leave behind, is importable as an empty package
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
    """There are credentials, and there is somebody to show them to. The SDK waits long where this does not."""
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
            wbauth.authenticate_session(host=url, source="dylora-moe", prompt=False, update_session=False) is not None
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
