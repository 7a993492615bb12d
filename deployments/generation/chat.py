"""Conversations: the messages of a chat request, and how a model's template makes one text of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError

from cluster.errors import InvalidRequestError
from cluster.families import FamilyName, fitting_family
from deployments.records import Conversation


class Transcript(NamedTuple):
    """The plain template of models that bring none: a line (or more) a message behind its role's label; the last line
    is the assistant's label, without the space after it, which is a part of the next word's token. `stops` are what a
    model writes when it goes on with somebody else's turn."""

    system: str
    user: str
    assistant: str
    stops: tuple[str, ...]

    def render(self, conversation: Conversation) -> str:
        labels = {"system": self.system, "user": self.user, "assistant": self.assistant}
        lines = [f"{labels[message.role]} {message.content}".lstrip(" ") for message in conversation.messages]
        return "\n".join([*lines, self.assistant])


# What a family's models without a template know best: gptneox's as RedPajama-INCITE-Chat's model card has it,
# starcoder's as the Tech Assistant prompt (bigcode/ta-prompt), bloom's as bloomz' tasks of questions and answers, and
# for llama's base models a transcript that speaks for itself. Only llama's has a label for system messages.
TRANSCRIPTS: dict[FamilyName, Transcript] = {
    "llama": Transcript("System:", "User:", "Assistant:", ("\nUser:", "\nSystem:")),
    "gptneox": Transcript("", "<human>:", "<bot>:", ("\n<human>:",)),
    "bloom": Transcript("", "Question:", "Answer:", ("\nQuestion:",)),
    "starcoder": Transcript("", "Human:", "Assistant:", ("\nHuman:", "\n-----")),
}


# What a template raises by raise_exception, and what it stumbles over.
_REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """A tokenizer's own chat template, or its family's transcript.

    A template is code from the checkpoint: transformers runs it in Jinja's immutable sandbox, where it reaches neither
    Python's internals nor files. It could still loop without end or fill the memory: as the weights, it is the
    operator's choice. Special tokens that a message spells out become special tokens, as in a plain prompt.
    """

    def __init__(self, template: str | None, names: Mapping[str, str], config: dict[str, Any]) -> None:
        """`names` of the special tokens that the template may call; `config` is the model's config.json."""
        self._names = dict(names)
        self._template = template
        self._transcript = TRANSCRIPTS[_family(config)]
        if template is not None:
            _renderer()  # takes a second the first time, which no request should wait for

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings to stop at besides the request's own; none for a model that was taught to end its turns."""
        return self._transcript.stops if self._template is None else ()

    def render(self, conversation: Conversation) -> str:
        """The text that the assistant's next message follows. Raises InvalidRequestError where the template does."""
        if self._template is None:
            return self._transcript.render(conversation)
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        try:
            (text,), _ = _renderer()(
                [messages], chat_template=self._template, add_generation_prompt=True, **self._names
            )
        except _REFUSALS as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error
        return str(text)

    def wrote_bos(self, text: str) -> bool:
        """Whether `text`, as rendered, begins with the BOS token, as templates that want one do by convention."""
        bos = self._names.get("bos_token", "")
        return self._template is not None and bool(bos) and text.startswith(bos)


def _renderer() -> Callable[..., Any]:
    """Jinja as transformers has it for templates: the sandbox, its filters and functions."""
    # transformers advises on import to install PyTorch, which a replica does without on purpose.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils.chat_template_utils import render_jinja_template

    return cast(Callable[..., Any], render_jinja_template)


def _family(config: dict[str, Any]) -> FamilyName:
    """As config.json tells; llama for what it leaves open, as that transcript suits any model."""
    return fitting_family(config.get("model_type"), config.get("architectures")) or "llama"
