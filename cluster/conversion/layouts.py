"""How names and rows of a checkpoint's tensors become those of the binary. Which tensors a family has is in its file in
`cluster/families/`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.families.tensors import Layout, RowOrder

# transformers 5 calls every output matrix so; it reads gptneox's under either name.
_ANY_OUTPUT = "lm_head.weight"


def base_name(name: str, layout: Layout) -> str:
    """The name that rules have for a stored tensor, as transformers finds it: the base model's prefix may be left out
    or there once too often. What transformers would not find (a third prefix, another one) is returned as it is."""
    once = name.removeprefix(layout.prefix)
    if once == _ANY_OUTPUT or name == layout.output:
        return layout.output
    base = once.removeprefix(layout.prefix)
    return name if base in (_ANY_OUTPUT, layout.output) else base


def output_rows(order: RowOrder, heads: int, head_width: int, source_rows: int) -> npt.NDArray[np.int64]:
    """For each row of the result, the row of the source that it is.

    interleave_halves  transformers rotates a head's first half against its second, llama.cpp neighbours: within a head,
                       rows 0, n/2, 1, n/2+1, ...; and each head as in repeat_heads.
    repeat_heads       a llama of grouped queries has fewer key and value heads than query heads; its runtime wants one
                       for every query head, so each is repeated for the neighbours that share it.
    split_qkv          bloom stores q, k, v of head 0, then of head 1, ...; its runtime wants all q, then all k, all v.
    repeat_kv          starcoder has one key and one value head; its runtime wants one for every query head.
    """
    rows: npt.NDArray[np.int64] = np.arange(source_rows, dtype=np.int64)
    if order == "interleave_halves":
        pairs = rows.reshape(-1, 2, head_width // 2).swapaxes(1, 2)
        rows = np.repeat(pairs, heads * head_width // source_rows, axis=0)
    elif order == "repeat_heads":
        rows = np.repeat(rows.reshape(-1, head_width), heads * head_width // source_rows, axis=0)
    elif order == "split_qkv":
        rows = rows.reshape(heads, 3, head_width).swapaxes(0, 1)
    elif order == "repeat_kv":
        query, key, value = np.split(rows, [heads * head_width, (heads + 1) * head_width])
        rows = np.concatenate([query, np.tile(key, heads), np.tile(value, heads)])
    return rows.reshape(-1)
