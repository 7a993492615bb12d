from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cluster.errors import EngineError
from deployments.cores import claim_cores


def test_replicas_of_a_node_get_disjoint_cores(tmp_path: Path) -> None:
    claims = [claim_cores(tmp_path, 2, range(6)) for _ in range(3)]
    assert sorted(core for claim in claims for core in claim.cores) == list(range(6))


def test_a_released_claim_is_free_again(tmp_path: Path) -> None:
    first = claim_cores(tmp_path, 2, range(2))
    first.release()
    assert claim_cores(tmp_path, 2, range(2)).cores == first.cores


def test_overcommitted_cores_are_shared_evenly(tmp_path: Path) -> None:
    claims = [claim_cores(tmp_path, 3, range(4)) for _ in range(4)]
    uses = Counter(core for claim in claims for core in claim.cores)
    assert set(uses.values()) == {3}
    assert all(len(set(claim.cores)) == 3 for claim in claims)


def test_only_the_given_cores_are_used(tmp_path: Path) -> None:
    assert set(claim_cores(tmp_path, 2, [5, 9]).cores) == {5, 9}


def test_more_threads_than_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"threads: 3 asked for, this node has 2 cores; set threads to 1\.\.2"):
        claim_cores(tmp_path, 3, range(2))
