"""Errors that crossed a Ray call, as they were raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayTaskError

from cluster.errors import NibbleError


@contextmanager
def raised_here() -> Iterator[None]:
    """Raises nibble's own error in place of the RayTaskError, with the remote stack, that Ray wraps it in."""
    try:
        yield
    except RayTaskError as error:
        cause = nibble_cause(error)
        if cause is None:
            raise
        raise cause from None


def nibble_cause(error: BaseException) -> NibbleError | None:
    """The NibbleError at the bottom of a chain of RayTaskErrors, None where it is something else."""
    cause: BaseException | None = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return cause if isinstance(cause, NibbleError) else None
