"""Tool calls in the text of an assistant's message: a file a form that the models of nibble's families speak.

Each form knows the chat templates that teach it, the grammar of a call that is forced, and how to read calls from text
that comes in pieces. To add one: a subclass of CallReader, an entry in FORMS, and its name in cluster/model_config.py.
"""

from __future__ import annotations

from cluster.model_config import ToolParser
from deployments.generation.tool_calls.hermes import HermesReader
from deployments.generation.tool_calls.llama_json import LlamaJsonReader
from deployments.generation.tool_calls.mistral import MistralReader
from deployments.generation.tool_calls.pythonic import PythonicReader
from deployments.generation.tool_calls.reader import CallReader

FORMS: dict[ToolParser, type[CallReader]] = {
    "hermes": HermesReader,
    "mistral": MistralReader,
    "pythonic": PythonicReader,
    "llama3_json": LlamaJsonReader,
}
DEFAULT = HermesReader  # of calls that are forced from a model that was taught none


def form_of(template: str | None, name: ToolParser | None = None) -> type[CallReader] | None:
    """The form named, else the one that the template teaches; None where it teaches none that is known here."""
    if name is not None:
        return FORMS[name]
    return next((form for form in FORMS.values() if template is not None and form.writes(template)), None)
