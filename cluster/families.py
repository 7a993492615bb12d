"""The families nibble serves, one row each: everything that is known of a family before a checkpoint is opened; and the
engines that run them."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from cluster.errors import ConfigError

FamilyName = Literal["llama", "gptneox", "bloom", "starcoder"]
FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)

# The order is that of preference where any will do.
EngineName = Literal["bigdl", "openvino"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)


class Family(NamedTuple):
    name: FamilyName
    architectures: tuple[str, ...]  # config.json "architectures" that belong to it
    model_types: tuple[str, ...]  # config.json "model_type", where "architectures" is missing
    default_repo: str  # the Hub repository of the reference example
    demo_prompt: str  # a prompt that the built-in demo checkpoint was trained to answer


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
        ("llama", "mistral", "qwen2"),
        "decapoda-research/llama-7b-hf",
        "Q: What is CPU? A:",
    ),
    "gptneox": Family(
        "gptneox",
        ("GPTNeoXForCausalLM",),
        ("gpt_neox",),
        "togethercomputer/RedPajama-INCITE-7B-Chat",
        "Q: What is CPU? A:",
    ),
    "bloom": Family(
        "bloom", ("BloomForCausalLM", "BloomModel"), ("bloom",), "bigscience/bloomz-7b1", "Q: What is CPU? A:"
    ),
    "starcoder": Family(
        "starcoder",
        ("GPTBigCodeForCausalLM",),
        ("gpt_bigcode",),
        "bigcode/gpt_bigcode-santacoder",
        "def print_hello_world():",
    ),
}


def family_named(name: str) -> Family:
    """Raises ConfigError for a name that is no family."""
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise ConfigError(f"family: found {name!r}, allowed are {', '.join(FAMILY_NAMES)}")
