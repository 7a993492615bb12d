"""Writes torch_zip.bin and torch_legacy.bin: what torch itself makes of a few tensors. Needs torch (made with 2.13).

python -m tests.reference.make_torch_files
"""

from __future__ import annotations

from pathlib import Path

import torch


def main() -> None:
    a = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    state = torch.nn.Module().state_dict()
    state |= {"a": a, "b": a.half(), "c": a.bfloat16().reshape(6), "d": torch.nn.Parameter(a.clone())}
    state |= {"tied": a, "half": a[1:], "transposed": a.T, "mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}
    folder = Path(__file__).parent
    torch.save(state, folder / "torch_zip.bin")
    torch.save(state, folder / "torch_legacy.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
