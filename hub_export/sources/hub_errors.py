"""What can go wrong between here and the Hub, said in one line each, and never with a token in it.

An exception of the network library may quote the request with its headers, so none is kept as a cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import DyloraMoeError, FailureError, InputError, one_line


LOGIN = "log in with `hf auth login`, or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"


def find_token(token: str | None) -> str:
    """Give the token that was passed, or else the one that huggingface_hub finds (HF_TOKEN, `hf auth login`).

    Raises:
        InputError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise InputError(f"no Hub token on this machine; {LOGIN}")
    check_token(token)
    return token


def check_token(token: str) -> None:
    """Raise InputError if a text cannot be a token.

    A stray line break or letter would come back in the network library's message, token and all.
    """
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError(f"the Hub token holds characters that no token has; {LOGIN}")


def without(secret: str | None, text: str) -> str:
    """Take a secret out of a text, and the query of any address in it, which may be signed for its bearer."""
    text = re.sub(r"(\w+://[^\s?]*)\?[^\s'\")]*", r"\1?…", text)
    return text.replace(secret, "***") if secret else text


@contextmanager
def hub_errors(hub_id: str, token: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub and of the network into `InputError` or `FailureError`, one line each."""
    try:
        yield
    except DyloraMoeError:
        raise
    except Exception as error:  # each release of the client and each network library has kinds of its own
        raise _explained(error, hub_id, token) from None


def _explained(error: Exception, hub_id: str, token: str | None) -> DyloraMoeError:
    from huggingface_hub import constants, errors

    said = without(token, getattr(error, "server_message", None) or one_line(error))
    said = " ".join(said.split())
    network_errors = getattr(errors, "HTTPError", OSError)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set, which forbids talking to the Hub; unset it")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return InputError(f"no Hub token on this machine; {LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{hub_id} is not a Hub id: {said}")
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(_status(error), hub_id, said)
    if isinstance(error, network_errors | ConnectionError | TimeoutError):
        return FailureError(f"{constants.ENDPOINT} cannot be reached ({said}); is there a network?")
    if isinstance(error, ValueError):  # the client checks the card's metadata before it sends it
        return InputError(f"{hub_id}: {said}")
    return FailureError(f"{hub_id}: {type(error).__name__}: {said}")


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _of_status(status: int | None, hub_id: str, said: str) -> DyloraMoeError:
    if status == 401:
        return InputError(f"the Hub does not accept this token for {hub_id} (401); {LOGIN}")
    if status == 403:
        return InputError(
            f"this token may not write to {hub_id} (403: {said}); use a token with write permission, of a user who may "
            "write there"
        )
    if status == 404:
        return InputError(f"the Hub has no {hub_id}, or this token may not see it (404: {said})")
    if status == 409:
        return InputError(f"{hub_id} clashes with something that is already on the Hub (409: {said})")
    if status is not None and 400 <= status < 500 and status != 429:
        return InputError(f"the Hub refused {hub_id} ({status}: {said})")
    return FailureError(f"the Hub failed on {hub_id} ({status}: {said}); try again later")
