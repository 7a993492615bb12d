from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.errors import EngineError
from cluster.machine.topology import Cpu
from deployments.cores import CoreClaim, claim_cores

# Two NUMA nodes of two cores with two hardware threads each.
SOCKETS = [Cpu(cpu, cpu % 4, cpu % 4 // 2) for cpu in range(8)]
SMT = "threads share physical cores (SMT)"
ACROSS = "they are of NUMA nodes 0, 1"
SHARED = "other replicas run on the same CPUs"


def plain(cpus: Iterable[int]) -> list[Cpu]:
    """Cores without SMT, of one node."""
    return [Cpu(cpu, cpu, 0) for cpu in cpus]


def found(claim: CoreClaim) -> tuple[set[int], tuple[str, ...]]:
    return set(claim.cores), claim.unmet


def test_replicas_of_a_node_get_disjoint_cores(tmp_path: Path) -> None:
    claims = [claim_cores(tmp_path, 2, plain(range(6))) for _ in range(3)]
    assert sorted(core for claim in claims for core in claim.cores) == list(range(6))
    assert [claim.unmet for claim in claims] == [()] * 3


def test_a_released_claim_is_free_again(tmp_path: Path) -> None:
    first = claim_cores(tmp_path, 2, plain(range(2)))
    first.release()
    assert found(claim_cores(tmp_path, 2, plain(range(2)))) == (set(first.cores), ())


def test_overcommitted_cores_are_shared_evenly_and_it_is_told(tmp_path: Path) -> None:
    claims = [claim_cores(tmp_path, 3, plain(range(4))) for _ in range(4)]
    uses = Counter(core for claim in claims for core in claim.cores)
    assert set(uses.values()) == {3}
    assert all(len(set(claim.cores)) == 3 for claim in claims)
    assert [claim.unmet for claim in claims] == [(), (SHARED,), (SHARED,), (SHARED,)]


def test_only_the_given_cores_are_used(tmp_path: Path) -> None:
    assert set(claim_cores(tmp_path, 2, plain([5, 9])).cores) == {5, 9}


def test_more_threads_than_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"threads: 3 asked for, this node has 2 cores; set threads to 1\.\.2"):
        claim_cores(tmp_path, 3, plain(range(2)))


def test_a_replica_has_physical_cores_of_one_numa_node(tmp_path: Path) -> None:
    first, second = claim_cores(tmp_path, 2, SOCKETS), claim_cores(tmp_path, 2, SOCKETS)
    assert (found(first), found(second)) == (({0, 1}, ()), ({2, 3}, ()))


def test_a_small_replica_leaves_a_whole_node_to_a_large_one(tmp_path: Path) -> None:
    small, large, next_small = (claim_cores(tmp_path, threads, SOCKETS) for threads in (1, 2, 1))
    assert [found(claim) for claim in (small, large, next_small)] == [({0}, ()), ({2, 3}, ()), ({1}, ())]


def test_where_no_node_has_room_it_reaches_across_them(tmp_path: Path) -> None:
    assert found(claim_cores(tmp_path, 3, SOCKETS)) == ({0, 1, 2}, (ACROSS,))


def test_second_hardware_threads_come_after_all_physical_cores(tmp_path: Path) -> None:
    assert found(claim_cores(tmp_path, 5, SOCKETS)) == ({0, 1, 2, 3, 4}, (SMT, ACROSS))
    assert found(claim_cores(tmp_path, 2, SOCKETS)) == ({5, 6}, (SMT, ACROSS))


def test_a_core_whose_other_hardware_thread_is_taken_is_told(tmp_path: Path) -> None:
    whole, beside = claim_cores(tmp_path, 4, SOCKETS), claim_cores(tmp_path, 1, SOCKETS)
    assert found(beside) == ({4}, (SMT,))
    whole.release()
    assert found(claim_cores(tmp_path, 1, SOCKETS)) == ({0}, (SMT,))


def test_a_cpuset_of_half_a_core_counts_as_a_core(tmp_path: Path) -> None:
    assert found(claim_cores(tmp_path, 2, [cpu for cpu in SOCKETS if cpu.number in (0, 5)])) == ({0, 5}, ())


def test_siblings_may_have_neighbouring_numbers(tmp_path: Path) -> None:
    """As in virtual machines."""
    cpus = [Cpu(cpu, cpu // 2 * 2, 0) for cpu in range(4)]
    assert found(claim_cores(tmp_path, 2, cpus)) == ({0, 2}, ())
    assert found(claim_cores(tmp_path, 2, cpus)) == ({1, 3}, (SMT,))
