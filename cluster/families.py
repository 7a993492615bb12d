"""The families nibble serves, one row each: everything that is known of a family before a checkpoint is opened; and the
engines that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from cluster.errors import ConfigError

FamilyName = Literal["llama", "gptneox", "bloom", "starcoder"]
FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)

# The order is that of preference where any will do.
EngineName = Literal["bigdl", "openvino"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)


class Family(NamedTuple):
    """`architectures` and `model_types` are what config.json may say, in any case of letters: decapoda-research and
    NVIDIA write LLaMAForCausalLM."""

    name: FamilyName
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]  # the first of each model type, in their order; then other spellings
    default_repo: str  # the Hub repository of the reference example
    alternatives: tuple[str, ...]  # well-known repositories without conditions that both engines run
    demo_prompt: str  # a prompt that the built-in demo checkpoint was trained to answer


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(
        "llama",
        ("llama", "mistral", "qwen2"),
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "LlamaModel",
            "MistralModel",
            "Qwen2Model",
        ),
        "decapoda-research/llama-7b-hf",
        ("huggyllama/llama-7b", "baffo32/decapoda-research-llama-7B-hf"),
        "Q: What is CPU? A:",
    ),
    "gptneox": Family(
        "gptneox",
        ("gpt_neox",),
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        "togethercomputer/RedPajama-INCITE-7B-Chat",
        ("togethercomputer/RedPajama-INCITE-7B-Base", "EleutherAI/pythia-6.9b"),
        "Q: What is CPU? A:",
    ),
    "bloom": Family(
        "bloom",
        ("bloom",),
        ("BloomForCausalLM", "BloomModel"),
        "bigscience/bloomz-7b1",
        ("bigscience/bloom-7b1", "bigscience/bloomz-3b"),
        "Q: What is CPU? A:",
    ),
    "starcoder": Family(
        "starcoder",
        ("gpt_bigcode",),
        # LMHeadModel: BigCode's own fork of transformers, before the model was in transformers.
        ("GPTBigCodeForCausalLM", "GPTBigCodeLMHeadModel", "GPTBigCodeModel"),
        "bigcode/gpt_bigcode-santacoder",
        ("bigcode/tiny_starcoder_py",),
        "def print_hello_world():",
    ),
}

# Of no family, though the same models exist in a form that is: the architecture, and what to take instead.
ELSEWHERE = {
    "GPT2LMHeadCustomModel": "bigcode/gpt_bigcode-santacoder has santacoder in the form of family starcoder: take that",
}


def fitting_family(model_type: object, architectures: object) -> FamilyName | None:
    """The family whose model transformers would make of a config.json. It goes by `model_type`, so that alone decides
    where it is given; but the architectures must be of some family too, or the weights are another model's (with a
    classifier in the place of the output matrix, for instance)."""
    by_type = _first(lambda family: _same(model_type, family.model_types))
    names = architecture_names(architectures)
    by_name = _first(lambda family: any(_same(name, family.architectures) for name in names))
    if names and by_name is None:
        return None
    return by_name if model_type is None else by_type


def architecture_names(architectures: object) -> list[str]:
    """Those in config.json's "architectures", none where it is no list."""
    return [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []


def _first(fits: Callable[[Family], bool]) -> FamilyName | None:
    return next((family.name for family in FAMILIES.values() if fits(family)), None)


def _same(found: object, known: tuple[str, ...]) -> bool:
    return isinstance(found, str) and found.lower() in {name.lower() for name in known}


def family_named(name: str) -> Family:
    """Raises ConfigError for a name that is no family."""
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise ConfigError(f"family: found {name!r}, allowed are {', '.join(FAMILY_NAMES)}")
