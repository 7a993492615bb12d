"""Where in a client's JSON schema something was found, for errors."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequestError


@dataclass(frozen=True)
class Place:
    """A JSON pointer into the schema that came in the request's field `field`."""

    field: str
    pointer: str = "#"

    def __truediv__(self, key: str | int) -> Place:
        return Place(self.field, f"{self.pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def refusal(self, why: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.field}: {self.pointer:.200}: {why}", field=self.field)

    def found(self, what: object, allowed: str) -> InvalidRequestError:
        return self.refusal(f"found {what!r:.100}, allowed is {allowed}")
