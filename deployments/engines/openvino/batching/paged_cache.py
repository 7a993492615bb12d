"""The book of a paged KV cache: which block holds what, who uses it, and which full blocks a new prompt can share.

A block holds the keys and values of BLOCK_TOKENS neighbouring tokens of a sequence. A full block is known by its tokens
and the block before it, hence by all tokens up to its end; sequences that begin alike share such blocks. Blocks that
nobody uses any more keep their content until they are needed, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import EngineError

BLOCK_TOKENS = 32  # what OpenVINO's CPU plugin has compiled in

# A full block's name: the id of the name before it and its tokens. Ids are never used twice, so a name never means
# another text than it did.
_Name = tuple[int, tuple[int, ...]]
_START = -1


@dataclass
class _Block:
    users: int = 0
    name: _Name | None = None
    id: int = 0  # of the name


class BlockPool:
    """`blocks`: how many there are."""

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._blocks = [_Block() for _ in range(blocks)]
        self._named: dict[_Name, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # the next to be taken first
        self._next_id = 0

    @property
    def free(self) -> int:
        return len(self._free)

    def reuse(self, tokens: Sequence[int], table: list[int]) -> int:
        """Appends to the empty block table those full blocks that hold the beginning of `tokens` already, all but the
        last token at most, and returns how many tokens they hold."""
        parent = _START
        for start in range(0, len(tokens) - BLOCK_TOKENS, BLOCK_TOKENS):
            index = self._named.get((parent, tuple(tokens[start : start + BLOCK_TOKENS])))
            if index is None:
                break
            self._take(index)
            table.append(index)
            parent = self._blocks[index].id
        return len(table) * BLOCK_TOKENS

    def grow(self, table: list[int], tokens: int) -> bool:
        """Makes the table long enough for so many tokens; False, and nothing changed, where blocks are lacking."""
        lacking = -(-tokens // BLOCK_TOKENS) - len(table)
        if lacking > len(self._free):
            return False
        for _ in range(lacking):
            index = next(iter(self._free))
            self._forget(index)
            self._take(index)
            table.append(index)
        return True

    def name_full(self, table: Sequence[int], tokens: Sequence[int], computed: int) -> None:
        """Says that the first `computed` of `tokens` are in the table's blocks: full ones can be shared from now on."""
        full = named = computed // BLOCK_TOKENS
        while named and self._blocks[table[named - 1]].name is None:  # those before it have names, too
            named -= 1
        parent = self._blocks[table[named - 1]].id if named else _START
        for number in range(named, full):
            block, start = self._blocks[table[number]], number * BLOCK_TOKENS
            block.name, block.id = (parent, tuple(tokens[start : start + BLOCK_TOKENS])), self._next_id
            self._next_id += 1
            # Where two sequences computed the same at the same time, the first one's block is the one to share.
            self._named.setdefault(block.name, table[number])
            parent = block.id

    def release(self, table: list[int]) -> None:
        """Empties the block table. The blocks' content stays until they are needed; a sequence's last ones go first,
        since what only it has is the least likely to be asked for again."""
        for index in reversed(table):
            block = self._blocks[index]
            block.users -= 1
            if block.users == 0:
                self._free[index] = None
                if block.name is None:
                    self._free.move_to_end(index, last=False)
        table.clear()

    def forget(self) -> None:
        """Nothing is shared from here on that was computed before."""
        for index in range(self.size):
            self._forget(index)

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """`tables`: all that are in use. Raises EngineError where the books do not add up."""
        users = [0] * self.size
        for table in tables:
            for index in table:
                users[index] += 1
        wrong = [
            i for i, block in enumerate(self._blocks) if block.users != users[i] or (users[i] == 0) != (i in self._free)
        ]
        lost = [name for name, index in self._named.items() if self._blocks[index].name != name]
        if wrong or lost:
            raise EngineError(
                f"KV cache: blocks {wrong[:5]} are counted wrongly, {len(lost)} names are of other blocks"
            )

    def _take(self, index: int) -> None:
        self._blocks[index].users += 1
        self._free.pop(index, None)

    def _forget(self, index: int) -> None:
        block = self._blocks[index]
        if block.name is not None and self._named.get(block.name) == index:
            del self._named[block.name]
        block.name = None
