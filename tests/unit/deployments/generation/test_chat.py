from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.errors import InvalidRequestError
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from deployments.generation.text import Tokenizer
from deployments.records import Conversation, Message, Role
from tests.conftest import DEMOS

TOKENIZERS = {family: Tokenizer(DEMOS / family) for family in FAMILY_NAMES}
ROLES_ALTERNATE = """\
{%- for message in messages -%}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
{{ raise_exception("roles must alternate user and assistant") }}
{%- endif -%}{{ message.content }}
{%- endfor -%}"""


def talk(*messages: tuple[Role, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in messages))


def tokenizer_with(folder: Path, family: FamilyName, template: str | None) -> Tokenizer:
    """The demo's with another chat template, or none."""
    shutil.copytree(DEMOS / family, folder / family, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / family / "chat_template.jinja"
    path.unlink(missing_ok=True)
    if template is not None:
        path.write_text(template)
    return Tokenizer(folder / family)


@pytest.mark.parametrize("family", ["llama", "gptneox", "bloom"])
def test_a_models_own_template_is_used(family: FamilyName) -> None:
    """Llama's writes the BOS itself, which must not come twice."""
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode_conversation(talk(("user", "What is CPU?"), ("assistant", "A chip."), ("user", "Why?")))
    assert ids == tokenizer.encode("Q: What is CPU? A: A chip.\nQ: Why? A:")
    assert tokenizer.chat_stops() == ()


def test_a_template_that_leaves_the_bos_out_gets_it_as_a_prompt_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "llama", "{%- for message in messages -%}{{ message.content }}{%- endfor -%}")
    assert tokenizer.encode_conversation(talk(("user", "unit"))) == TOKENIZERS["llama"].encode("unit")


@pytest.mark.parametrize(
    ("family", "text", "stop"),
    [
        ("llama", "System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: a\nb\nAssistant:", "\nUser:"),
        ("gptneox", "Be brief.\n<human>: Hi\n<bot>: Hello\n<human>: a\nb\n<bot>:", "\n<human>:"),
        ("bloom", "Be brief.\nQuestion: Hi\nAnswer: Hello\nQuestion: a\nb\nAnswer:", "\nQuestion:"),
        ("starcoder", "Be brief.\nHuman: Hi\nAssistant: Hello\nHuman: a\nb\nAssistant:", "\nHuman:"),
    ],
)
def test_without_a_template_a_conversation_is_its_familys_transcript(
    tmp_path: Path, family: FamilyName, text: str, stop: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, family, None)
    conversation = talk(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "a\nb"))
    assert tokenizer.encode_conversation(conversation) == TOKENIZERS[family].encode(text)
    assert stop in tokenizer.chat_stops()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_family_is_found_by_the_model_type_too(tmp_path: Path, family: FamilyName) -> None:
    tokenizer_with(tmp_path, family, None)
    config = {"vocab_size": 512, "model_type": FAMILIES[family].model_types[0]}
    (tmp_path / family / "config.json").write_text(json.dumps(config))
    known = tokenizer_with(tmp_path / "known", family, None)
    tokenizer = Tokenizer(tmp_path / family)
    assert tokenizer.chat_stops() == known.chat_stops()
    assert tokenizer.encode_conversation(talk(("user", "a"))) == known.encode_conversation(talk(("user", "a")))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ROLES_ALTERNATE, "roles must alternate user and assistant"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[7].content.strip() }}", "no element 7"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% if %}", "Expected an expression"),
        # Jinja's sandbox: no way from a template to Python's internals, and nothing it is given can be changed.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__['__builtins__'] }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ '%s'.__mod__.__self__.__class__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_refuses_names_the_messages(tmp_path: Path, template: str, why: str) -> None:
    tokenizer = tokenizer_with(tmp_path, "bloom", template)
    with pytest.raises(InvalidRequestError, match=f"^messages: the model's chat template refuses them: .*({why})") as e:
        tokenizer.encode_conversation(talk(("user", "a"), ("user", "b")))
    assert e.value.field == "messages"


def test_a_template_may_take_some_conversations_and_refuse_others(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "bloom", ROLES_ALTERNATE)
    accepted = talk(("user", "a"), ("assistant", "b"))
    assert tokenizer.decode(tokenizer.encode_conversation(accepted)) == "ab"


def test_a_template_hears_what_the_request_says(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages -%}{{ m.name or m.role }}:{{ m.content }};{%- endfor -%}"
        "{{ mode }}{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer, said = tokenizer_with(tmp_path, "bloom", template), Message("user", "hi", "bob")
    for conversation, text in (
        (Conversation((said,)), "bob:hi;A:"),
        (Conversation((said,), add_generation_prompt=False), "bob:hi;"),
        (Conversation((said,), template_arguments={"mode": "x"}), "bob:hi;xA:"),
        (Conversation((said,), add_generation_prompt=False, continue_final_message=True), "bob:hi"),
    ):
        assert tokenizer.decode(tokenizer.encode_conversation(conversation)) == text


@pytest.mark.parametrize("wanted", [None, True, False])
def test_special_tokens_are_added_to_a_conversation_as_the_request_says(wanted: bool | None) -> None:
    """Unless it says anything: where the template has not written them, as llama's has."""
    llama = TOKENIZERS["llama"]
    plain = llama.encode_conversation(talk(("user", "a")))
    ids = llama.encode_conversation(Conversation((Message("user", "a"),), add_special_tokens=wanted))
    assert ids == (plain if not wanted else (plain[0], *plain))


def test_a_plain_transcript_may_end_in_the_last_message() -> None:
    starcoder = TOKENIZERS["starcoder"]
    conversation = Conversation((Message("user", "a"), Message("assistant", "b")), False, True)
    assert starcoder.decode(starcoder.encode_conversation(conversation)) == "Human: a\nAssistant: b"


@pytest.mark.parametrize("family", ["llama", "starcoder"])
def test_half_a_surrogate_pair_in_a_message_is_refused(family: FamilyName) -> None:
    with pytest.raises(InvalidRequestError, match="messages: found half a surrogate pair") as e:
        TOKENIZERS[family].encode_conversation(talk(("user", "a\ud800")))
    assert e.value.field == "messages"
