from __future__ import annotations

import pytest

from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName, fitting_family

# What config.json of public checkpoints says, and nibble's family for it.
SPELLINGS: list[tuple[str, str, FamilyName]] = [
    ("llama", "LlamaForCausalLM", "llama"),
    ("llama", "LLaMAForCausalLM", "llama"),  # decapoda-research/llama-7b-hf, nvidia/Llama3-ChatQA-2-8B
    ("llama", "LlamaModel", "llama"),
    ("llama", "LLaMAModel", "llama"),
    ("mistral", "MistralForCausalLM", "llama"),
    ("mistral", "MistralModel", "llama"),  # intfloat/e5-mistral-7b-instruct
    ("qwen2", "Qwen2ForCausalLM", "llama"),
    ("qwen2", "Qwen2Model", "llama"),
    ("gpt_neox", "GPTNeoXForCausalLM", "gptneox"),
    ("gpt_neox", "GPTNeoXModel", "gptneox"),
    ("bloom", "BloomForCausalLM", "bloom"),
    ("bloom", "BloomModel", "bloom"),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", "starcoder"),
    ("gpt_bigcode", "GPTBigCodeModel", "starcoder"),
    ("gpt_bigcode", "GPTBigCodeLMHeadModel", "starcoder"),  # BigCode's fork of transformers
]


@pytest.mark.parametrize(("model_type", "architecture", "family"), SPELLINGS)
def test_every_spelling_that_public_checkpoints_have_is_known(
    model_type: str, architecture: str, family: FamilyName
) -> None:
    for type_given in (model_type, None, model_type.upper()):
        for architectures in ([architecture], [architecture.lower()]):
            assert fitting_family(type_given, architectures) == family
    for none in (None, [], "LlamaForCausalLM", [1]):
        assert fitting_family(model_type, none) == family


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("gpt2", "GPT2LMHeadCustomModel"),  # bigcode/santacoder, whose attention has another layout
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM"),
        ("starcoder2", "Starcoder2ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("qwen2_moe", "Qwen2MoeForCausalLM"),
        ("Yi", "YiForCausalLM"),
        ("RefinedWeb", "RWForCausalLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("mistral", "MixtralForCausalLM"),
        (None, "llama"),
    ],
)
def test_other_models_are_of_no_family(model_type: str | None, architecture: str) -> None:
    assert fitting_family(model_type, [architecture]) is None


def test_the_model_type_decides_between_two_families_as_in_transformers() -> None:
    assert fitting_family("gpt_neox", ["BloomForCausalLM"]) == "gptneox"
    assert fitting_family("t5", ["BloomForCausalLM"]) is None


def test_alternatives_to_a_default_are_other_repositories() -> None:
    for name in FAMILY_NAMES:
        family = FAMILIES[name]
        assert family.alternatives
        assert family.default_repo not in family.alternatives
