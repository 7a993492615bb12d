"""NetworkPolicies as nftables rules in each pod's network namespace.

The node's own packets always pass, as Kubernetes has it for the kubelet's probes. The addresses from which Services
and the operator connect are peers like pods, with labels of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.k8s.lookalike.commands import CommandError, run
from tests.k8s.lookalike.documents import Document, matches

TABLE = "inet nblk_policy"


class Peer(NamedTuple):
    """What a policy may name: a pod, or who connects from outside of pods."""

    address: str
    namespace: str
    labels: dict[str, str]


def rules(
    pod: Peer, policies: list[Document], peers: list[Peer], node: str, namespaces: dict[str, dict[str, str]]
) -> str:
    """For `nft -f -`, in one piece: the table of before is replaced. Every direction that no policy names is open."""
    applying = [
        each["spec"]
        for each in policies
        if each["metadata"].get("namespace", "default") == pod.namespace
        and matches(each["spec"].get("podSelector", {}), pod.labels)
    ]
    chains = []
    for direction, hook, field, other in (("Ingress", "input", "saddr", "from"), ("Egress", "output", "daddr", "to")):
        specs = [spec for spec in applying if direction in types(spec)]
        if not specs:
            continue
        lines = [f"type filter hook {hook} priority 0; policy drop;", "ct state established,related accept"]
        lines += [f"{'iif' if hook == 'input' else 'oif'} lo accept", f"ip {field} {node} accept"]
        for rule in (rule for spec in specs for rule in spec.get(direction.lower(), [])):
            lines += allowed(rule.get(other), rule.get("ports"), field, pod.namespace, peers, namespaces)
        chains.append(f"chain {hook} {{\n" + "\n".join(lines) + "\n}")
    return f"table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n" + "\n".join(chains) + "\n}\n"


def types(spec: Document) -> list[str]:
    return list(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def allowed(
    sources: list[Document] | None,
    ports: list[Document] | None,
    field: str,
    namespace: str,
    peers: list[Peer],
    namespaces: dict[str, dict[str, str]],
) -> list[str]:
    """The lines of one rule."""
    if sources:
        chosen = {a for source in sources for a in addresses(source, namespace, peers, namespaces)}
        if not chosen:
            return []
        where = f"ip {field} {{ {', '.join(sorted(chosen))} }} "
    else:
        where = ""
    if not ports:
        return [f"{where}accept"]
    return [f"{where}{each.get('protocol', 'TCP').lower()} dport {port_range(each)} accept" for each in ports]


def port_range(port: Document) -> str:
    if not isinstance(port["port"], int):
        raise ValueError(f"ports: found {port['port']!r}, the look-alike allows numbers")
    return f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])


def addresses(source: Document, namespace: str, peers: list[Peer], namespaces: dict[str, dict[str, str]]) -> list[str]:
    if "ipBlock" in source:
        return [source["ipBlock"]["cidr"]]
    return [
        peer.address
        for peer in peers
        if (
            matches(source["namespaceSelector"], namespaces.get(peer.namespace, {}))
            if "namespaceSelector" in source
            else peer.namespace == namespace
        )
        and ("podSelector" not in source or matches(source["podSelector"], peer.labels))
    ]


async def apply(pid: int, ruleset: str) -> None:
    """In the network namespace of that process, unless it has ended."""
    try:
        await run("nsenter", "-t", str(pid), "-n", "nft", "-f", "-", stdin=ruleset)
    except CommandError:
        if Path(f"/proc/{pid}/ns/net").exists():  # one that has ended and is not waited for yet has none
            raise
