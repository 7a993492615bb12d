"""The names of the families and of the engines that run them."""

from __future__ import annotations

from typing import Literal, get_args

# bigdl-llm's names: its libraries and binaries are called so.
FamilyName = Literal["llama", "gptneox", "bloom", "starcoder"]
FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)

# The order is that of preference where any will do.
EngineName = Literal["bigdl", "openvino"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)
