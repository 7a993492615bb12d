"""Asking the Hub: a bounded number of times, waiting as long as it says, and with errors that say what to do.

What huggingface_hub raises is translated here, once. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are its own:
they are read from the environment of the process that asks, and the token goes to the endpoint alone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's by its version
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cluster.errors import CheckpointError, HubUnavailableError, NoRepositoryError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

ATTEMPTS = 4
LONGEST_WAIT_S = 60.0  # a Hub that asks for more is reported at once
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class DamagedDownloadError(Exception):
    """A downloaded file does not have the content that the Hub says it has."""


def ask(what: str, operation: Callable[[], Answer], attempts: int = ATTEMPTS) -> Answer:
    """The operation's result. Tried again, at most `attempts` times in all, where the Hub limits (as long after as
    Retry-After says), has an error of its own, or the connection breaks.

    Raises HubUnavailableError where that does not help, else CheckpointError; messages begin with `what`.
    """
    for attempt in range(1, attempts + 1):
        try:
            return operation()
        except (HTTPError, OSError, ValueError, KeyError, TypeError, RuntimeError, DamagedDownloadError) as error:
            wait = _wait(error, attempt)
            if attempt == attempts or wait is None:
                raise _translated(what, error, attempt) from error
            logger.warning("%s: %s; trying again in %.0f s", what, _first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt; None where there is no use in one."""
    if isinstance(error, LocalEntryNotFoundError):
        return None  # hf_hub_download has asked several times already
    answer = _answer(error)
    if answer is None:
        return 2.0 ** (attempt - 1) if isinstance(error, HTTPError | DamagedDownloadError) else None
    if answer.response.status_code not in _TRY_AGAIN:
        return None
    wait = _retry_after(answer) or 2.0 ** (attempt - 1)
    return wait if wait <= LONGEST_WAIT_S else None


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer that an error came from, None where there was none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _retry_after(answer: HfHubHTTPError) -> float | None:
    """From Retry-After or, as the Hub itself says it, RateLimit: "api";r=0;t=55."""
    headers = answer.response.headers
    found = re.match(r"\s*(\d+)\s*$", headers.get("Retry-After", ""))
    if found is None and answer.response.status_code == 429:
        found = re.search(r";\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(found[1]) if found else None


def _translated(what: str, error: Exception, attempts: int) -> CheckpointError:
    answer = _answer(error)
    if answer is not None:
        return _refusal(what, answer, attempts)
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return HubUnavailableError(
            f"{what} is not in the local Hub cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: go online once,"
            " or name a folder"
        )
    if isinstance(error, HFValidationError):
        return CheckpointError(f"{what}: {_first_line(error)}")
    if isinstance(error, DamagedDownloadError):
        return CheckpointError(f"{what}: {error}, {attempts} times: try again later")
    if isinstance(error, HTTPError | LocalEntryNotFoundError | ConnectionError | TimeoutError):
        reason = _first_line(error.__cause__ or error)
        return HubUnavailableError(
            f"{what} is not in the local Hub cache {constants.HF_HUB_CACHE}, and the Hub at {constants.ENDPOINT} cannot"
            f" be reached ({reason}): check the network and HF_ENDPOINT, or name a folder"
        )
    if isinstance(error, OSError) and error.strerror:
        return CheckpointError(f"{what} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}")
    return CheckpointError(
        f"{what}: {constants.ENDPOINT} did not answer as the Hub does ({type(error).__name__}: {_first_line(error)}):"
        " check HF_ENDPOINT"
    )


def _refusal(what: str, answer: HfHubHTTPError, attempts: int) -> CheckpointError:
    status = answer.response.status_code
    where = f"the Hub at {constants.ENDPOINT}"
    if isinstance(answer, GatedRepoError):
        return CheckpointError(
            f"{what} is gated ({status}): accept its conditions on its page of the Hub, then set HF_TOKEN to a token of"
            " that account, on every node"
        )
    if isinstance(answer, RevisionNotFoundError):
        return CheckpointError(f"{what}: the repository has no such revision; name a branch, a tag or a commit of it")
    if isinstance(answer, EntryNotFoundError):
        return CheckpointError(f"{what}: no such file at this revision")
    if status == 401:
        return NoRepositoryError(
            f"{what}: {where} says unauthorized ({status}): there is no such repository, or it is private, or the token"
            " is wrong: check the name, and set HF_TOKEN to a token that may read it, on every node"
        )
    if isinstance(answer, RepositoryNotFoundError) or status == 404:
        return NoRepositoryError(f"{what}: {where} has no such repository: check the name")
    if status == 429:
        wait = _retry_after(answer)
        when = f"in {wait:.0f} s" if wait else "later"
        return HubUnavailableError(
            f"{what}: {where} limits the rate of requests ({status}), after {attempts} attempts: try again {when}, set"
            " HF_TOKEN (its limit is higher), or name a folder"
        )
    if status in _TRY_AGAIN or status >= 500:
        return HubUnavailableError(
            f"{what}: {where} has an error of its own ({status}), after {attempts} attempts: try again later, or name a"
            " folder"
        )
    return CheckpointError(
        f"{what}: {where} refuses ({status}): {_first_line(answer)}; check the rights of the token in HF_TOKEN"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
