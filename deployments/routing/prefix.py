"""Routing by cost: which replica a completion goes to, by the seconds that each is estimated to take for it.

The cost of a replica is the prefill of what it has not in its KV cache, the prefill of the prompts that wait there, and
what its completions still decode, at rates that are measured of all replicas together: where one is slower, its work
stays longer, and counts longer. A router knows what is in a replica's cache
by what it sent there itself: it keeps the least recently used blocks of prompts as digests, in bounded memory, and
drops what the first chunk of a stream shows to be gone. It has no tokenizer, so that a block is a piece of the prompt's
bytes, or of its token ids. A router or a replica that has just begun knows nothing, and then the load alone decides.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import NamedTuple

from deployments.records import Conversation, GenerationChunk, GenerationRequest

# About the 32 tokens of an engine's own block (engine openvino's pages, engine bigdl's batches).
BLOCK_BYTES, BLOCK_IDS = 128, 32
# Of one prompt; what comes behind them makes no difference.
MAX_PROMPT_BLOCKS = 4096
# Known of one replica: some 3 MiB.
MAX_BLOCKS = 1 << 14
MAX_SESSIONS = 10_000
# A session leaves its replica where that one is busier than the least busy one by so many seconds, or by what it takes
# to compute the prompt anew if that is more, and by this factor.
STICKY_S, STICKY_TIMES = 0.5, 1.5
# Costs that differ by less are the same: tokens are estimated, and no better than that.
SAME_TIMES, SAME_S = 1.25, 0.005
# Less than this part of the expected tokens were cached: the replica has dropped them. A difference of some blocks has
# other reasons, such as a chat template that writes earlier messages in another way.
DROPPED = 0.5
# Seconds a token, before any was measured; about so many of the last measurements count. What takes one step of an
# engine or less tells more of what a request costs beside its tokens, and is not measured.
PREFILL_S, DECODE_S = 0.01, 0.05
SAMPLES = 32
LEAST_PREFILL = 64


class Prefix(NamedTuple):
    """`blocks`: for each whole block a digest of the prompt up to its end. `length`: of the prompt, `size` of a block,
    in bytes or token ids."""

    blocks: tuple[int, ...]
    length: int
    size: int

    def part(self, blocks: int) -> float:
        """That the first so many blocks are of the prompt, 0 to 1."""
        return min(1.0, blocks * self.size / self.length) if self.length else 0.0


NO_PREFIX = Prefix((), 0, BLOCK_BYTES)


def prefix_of(request: GenerationRequest) -> Prefix:
    """Prompts that begin with the same tokens have blocks in common; those of text, of ids and of messages are never
    equal to each other."""
    prompt = request.prompt
    if request.truncate_prompt_tokens is not None:
        return NO_PREFIX  # it is not known where it begins
    if isinstance(prompt, tuple):
        return digested(b"ids", b"".join(id.to_bytes(4, "little") for id in prompt), 4 * BLOCK_IDS)
    if isinstance(prompt, str):
        return digested(b"text%d" % request.add_special_tokens, prompt.encode(errors="surrogatepass"), BLOCK_BYTES)
    head = (prompt.add_special_tokens, sorted(prompt.template_arguments.items()), prompt.tools)
    return digested(b"chat" + repr(head).encode(errors="surrogatepass"), told(prompt), BLOCK_BYTES)


def told(conversation: Conversation) -> bytes:
    """The messages as bytes, each with its end marked; those of the next turn begin with the same."""
    parts = [
        f"{message.role}\0{message.name or ''}\0{message.content}\0{message.tool_calls or ''}\0{message.tool_call_id}\1"
        for message in conversation.messages
    ]
    return "".join(parts).encode(errors="surrogatepass")


def digested(kind: bytes, text: bytes, size: int) -> Prefix:
    digest, blocks = blake2b(kind, digest_size=8), []
    for start in range(0, min(len(text), MAX_PROMPT_BLOCKS * size) - size + 1, size):
        digest.update(text[start : start + size])
        blocks.append(int.from_bytes(digest.digest(), "little"))
    return Prefix(tuple(blocks), len(text), size)


class CachedBlocks:
    """What one replica has in its KV cache, as far as this router knows. `single`: it has the last prompt alone."""

    def __init__(self, capacity: int, single: bool) -> None:
        self._capacity, self._single = min(capacity, MAX_BLOCKS), single
        self._used: OrderedDict[int, int] = OrderedDict()  # when each was used last, the least recently used first
        self._expected: set[int] = set()  # of these, those that are not computed yet
        self._uses = 0

    def __len__(self) -> int:
        return len(self._used)

    def known(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks, from the first on, it has or will have."""
        return sum(1 for _ in takewhile(self._used.__contains__, blocks))

    def last_uses(self, blocks: Sequence[int]) -> list[int]:
        """Of a prompt's blocks that are computed, from the first on, when they were used last."""
        there = takewhile(lambda block: block in self._used and block not in self._expected, blocks)
        return [self._used[block] for block in there]

    def use(self, blocks: Sequence[int]) -> list[int]:
        """The replica computes these, or has them; returns the ones that are new."""
        new = [block for block in blocks if block not in self._used]
        if self._single:
            self._used.clear()
        self._uses += 1
        for block in reversed(blocks):  # an engine drops a prompt's last blocks first
            self._used[block] = self._uses
            self._used.move_to_end(block)
        self._expected.update(new)
        while len(self._used) > self._capacity:
            self._used.popitem(last=False)
        self._expected &= self._used.keys()
        return new

    def computed(self, blocks: Iterable[int]) -> None:
        self._expected.difference_update(blocks)

    def give_up(self, blocks: Iterable[int]) -> None:
        """Those of them that are still expected will not be computed."""
        for block in self._expected.intersection(blocks):
            self._expected.remove(block)
            del self._used[block]

    def dropped(self, last_use: int) -> None:
        """What was used last then is gone, and hence all that was used last before."""
        while self._used and self._used[next(iter(self._used))] <= last_use:
            block, _ = self._used.popitem(last=False)
            self._expected.discard(block)

    def check_integrity(self) -> None:
        assert len(self._used) <= self._capacity
        assert self._expected <= self._used.keys()
        assert list(self._used.values()) == sorted(self._used.values())


class Rate:
    """Seconds a token, measured; older measurements have less weight. It begins with `seconds`, which the first one
    outweighs."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._tokens = seconds, 1.0

    @property
    def a_token(self) -> float:
        return self._seconds / self._tokens

    def learn(self, tokens: float, seconds: float) -> None:
        keep = 1 - 1 / SAMPLES
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds


class Routed:
    """A completion on its way: estimated tokens of its prompt and of what it generates, and then where it went."""

    def __init__(self, prefix: Prefix, session: str | None, prompt_tokens: int, completion_tokens: int) -> None:
        self.prefix, self.session = prefix, session
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.replica: str | None = None
        self.generated = 0
        self.uncached = 0  # of the prompt's tokens, as expected
        self.alone = False  # whether no prompt was before it at its replica
        self.sent_at = 0.0
        self.first: tuple[float, int] | None = None  # when the first tokens came, and how many
        self.last_uses: list[int] = []
        self.new_blocks: list[int] = []


class ReplicaWork:
    """`prompt_tokens` and `completion_tokens`: of the completions that this router has there, those of prompts that are
    not computed yet, and all that are generated."""

    def __init__(self, blocks: CachedBlocks) -> None:
        self.blocks = blocks
        self.completions: dict[Routed, None] = {}
        self.prompt_tokens = self.completion_tokens = 0

    def uncached(self, routed: Routed) -> int:
        """Of the prompt's tokens, one at least."""
        part = routed.prefix.part(self.blocks.known(routed.prefix.blocks))
        return max(1, round(routed.prompt_tokens * (1 - part)))


class ReplicaCosts:
    """Of one model's replicas, by their ids. `cache_tokens`: what a replica's KV cache holds at most; `single`: one
    sequence, whose prompt alone the next one can share."""

    def __init__(self, cache_tokens: int, single: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._single, self._clock = max(1, cache_tokens // BLOCK_IDS), single, clock
        self._replicas: dict[str, ReplicaWork] = {}
        self._sessions: OrderedDict[str, str] = OrderedDict()  # the replica of each, the last one used last
        self._prefill = Rate(PREFILL_S)
        # Computed together, a completion adds to each step what one more token of a prompt would.
        self._decode = Rate(DECODE_S) if single else self._prefill

    def keep(self, replicas: Iterable[str]) -> None:
        """Those that take requests; the others are forgotten."""
        alive = set(replicas)
        for gone in self._replicas.keys() - alive:
            for routed in self._replicas.pop(gone).completions:
                routed.replica = None
        for new in alive - self._replicas.keys():
            self._replicas[new] = ReplicaWork(CachedBlocks(self._capacity, self._single))

    def completions(self, replica: str) -> int:
        """That this router has there."""
        return len(self._replicas[replica].completions)

    def choose(self, routed: Routed, others: Mapping[str, int]) -> str:
        """One of the replicas in `others`, which are known (`keep`) and have room: where the completion goes from now
        on. `others`: requests there that are no completions of this router."""
        self._leave(routed)
        loads = {id: self._load_s(self._replicas[id], routed, count) for id, count in others.items()}
        home = self._sessions.get(routed.session) if routed.session is not None else None
        chosen = home if home in loads and not self._busier(home, loads, routed) else self._cheapest(loads, routed)
        self._enter(routed, chosen)
        return chosen

    def came(self, routed: Routed, chunk: GenerationChunk) -> None:
        """A piece of the completion."""
        routed.generated = chunk.completion_tokens
        if routed.first is None and chunk.completion_tokens:
            self._first_token(routed, chunk.prompt_tokens, chunk.cached_tokens)

    def end(self, routed: Routed) -> None:
        """It has ended, however it did; a second time does nothing."""
        replica = self._replicas.get(routed.replica) if routed.replica is not None else None
        if replica is not None and routed.first is not None:
            first_at, first_tokens = routed.first
            if not self._single:
                replica.blocks.computed(replica.blocks.use(routed.prefix.blocks))  # the engine frees them only now
            elif routed.generated > first_tokens:
                self._decode.learn(routed.generated - first_tokens, self._clock() - first_at)
        self._leave(routed)

    def check_integrity(self) -> None:
        for replica in self._replicas.values():
            there = replica.completions
            replica.blocks.check_integrity()
            assert replica.prompt_tokens == sum(routed.uncached for routed in there if routed.first is None)
            assert replica.completion_tokens == sum(routed.completion_tokens for routed in there)
        assert len(self._sessions) <= MAX_SESSIONS

    def _work_s(self, prompt_tokens: float, completion_tokens: float) -> float:
        return prompt_tokens * self._prefill.a_token + completion_tokens * self._decode.a_token

    def _load_s(self, replica: ReplicaWork, routed: Routed, others: int) -> float:
        """Until all that is there has ended. Each of the `others` counts as this completion."""
        own = self._work_s(replica.prompt_tokens, replica.completion_tokens)
        return own + others * self._work_s(routed.prompt_tokens, routed.completion_tokens)

    def _busier(self, home: str, loads: Mapping[str, float], routed: Routed) -> bool:
        """Whether it is clearly busier than another one."""
        least, anew = min(loads.values()), self._work_s(routed.prompt_tokens, 0)
        return loads[home] > least + max(STICKY_S, anew) and loads[home] > STICKY_TIMES * least

    def _cheapest(self, loads: Mapping[str, float], routed: Routed) -> str:
        costs = {id: load + self._work_s(self._replicas[id].uncached(routed), 0) for id, load in loads.items()}
        most = min(costs.values()) * SAME_TIMES + SAME_S
        same = [id for id, cost in costs.items() if cost <= most]
        key = routed.session or next(map(str, routed.prefix.blocks), None)
        if key is None:
            return random.choice(same)
        # Several routers, which know nothing of each other's, choose the same one.
        return max(same, key=lambda id: blake2b(f"{key}\0{id}".encode(errors="surrogatepass"), digest_size=8).digest())

    def _enter(self, routed: Routed, id: str) -> None:
        replica = self._replicas[id]
        routed.replica, routed.uncached = id, replica.uncached(routed)
        # Engine bigdl computes nothing of it before all that came earlier has ended.
        routed.alone = not replica.prompt_tokens and not (self._single and replica.completions)
        routed.sent_at, routed.first = self._clock(), None
        routed.last_uses = replica.blocks.last_uses(routed.prefix.blocks)
        routed.new_blocks = replica.blocks.use(routed.prefix.blocks)
        replica.completions[routed] = None
        replica.prompt_tokens += routed.uncached
        replica.completion_tokens += routed.completion_tokens
        if routed.session is not None:
            self._sessions[routed.session] = id
            self._sessions.move_to_end(routed.session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _leave(self, routed: Routed) -> None:
        if routed.replica is None:
            return
        replica = self._replicas[routed.replica]
        del replica.completions[routed]
        replica.completion_tokens -= routed.completion_tokens
        if routed.first is None:
            replica.prompt_tokens -= routed.uncached
            replica.blocks.give_up(routed.new_blocks)
        routed.replica = None

    def _first_token(self, routed: Routed, prompt_tokens: int, cached_tokens: int) -> None:
        replica = self._replicas.get(routed.replica) if routed.replica is not None else None
        if replica is None:
            return
        replica.prompt_tokens -= routed.uncached
        routed.first = self._clock(), routed.generated
        replica.blocks.computed(routed.new_blocks)
        computed = prompt_tokens - cached_tokens
        if routed.alone and computed >= LEAST_PREFILL:
            self._prefill.learn(computed, self._clock() - routed.sent_at)
        expected = prompt_tokens * routed.prefix.part(len(routed.last_uses))
        if cached_tokens < DROPPED * expected:
            there = int(len(routed.prefix.blocks) * cached_tokens / prompt_tokens)
            replica.blocks.dropped(max(routed.last_uses[there:]))
