from __future__ import annotations

import pickle

import pytest

from cluster import errors
from cluster.errors import InvalidRequestError, NibbleError, QueueFullError, RateLimitError

CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, NibbleError)]


@pytest.mark.parametrize("error", CLASSES)
def test_errors_keep_their_message_across_processes(error: type[NibbleError]) -> None:
    found = pickle.loads(pickle.dumps(error("what is wrong")))
    assert type(found) is error
    assert str(found) == "what is wrong"


def test_what_else_errors_carry_crosses_processes_too() -> None:
    assert pickle.loads(pickle.dumps(InvalidRequestError("n: too many", "n"))).field == "n"
    for error in (QueueFullError, RateLimitError):
        assert pickle.loads(pickle.dumps(error("full", 7))).retry_after_s == 7
        assert error("full").retry_after_s == 1
