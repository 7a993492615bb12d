from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.integration.processes import Served


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield channel
