"""The fields of OpenAI's and vLLM's requests, and what becomes of each here: one table, which the parser reads and
docs/reference/fields.md shows (`make docs`).

A field is implemented (it is in a class of `schema.py`), or known: left out where its value changes nothing, refused
where it would. Null and an empty list change nothing. A field that is in no row is refused unless it is null or empty,
so that a typing error is seen.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Api = Literal["OpenAI", "vLLM", "nibble"]
# A request's body, or an object inside one.
Place = Literal[
    "completions", "chat", "embeddings", "tokenize", "detokenize",
    "stream_options", "messages[]", "content[]", "structured_outputs",
    "responses", "text", "reasoning", "message item", "function_call item", "function_call_output item",
    "reasoning item", "input part",
]  # fmt: skip
ANYTHING: Literal["anything"] = "anything"
EMPTY: tuple[Any, ...] = (None, [])  # always left out

GENERATING: tuple[Place, ...] = ("completions", "chat")
RESPONSES: tuple[Place, ...] = ("responses",)
ANSWERING: tuple[Place, ...] = (*GENERATING, *RESPONSES)
# Of the input of a response.
CALL_ITEMS: tuple[Place, ...] = ("function_call item", "function_call_output item")
ITEMS: tuple[Place, ...] = ("message item", *CALL_ITEMS)


class Field(NamedTuple):
    """`neutral`: of a field that is not implemented, the values that are left out beside null and an empty list: some,
    none or `anything`; None for an implemented field. `note`: why the others are refused, or what is done."""

    name: str
    api: Api
    places: tuple[Place, ...]
    neutral: tuple[Any, ...] | Literal["anything"] | None
    note: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value of a field that is not implemented changes nothing."""
        if self.neutral is None:
            return False
        return self.neutral == ANYTHING or any(same(value, each) for each in (*EMPTY, *self.neutral))

    @property
    def refusal(self) -> str:
        """What an error says behind the value that was found."""
        return f"allowed are {', '.join(map(as_json, (*(self.neutral or ()), None)))}: {self.note}"


def same(value: Any, other: Any) -> bool:
    """As JSON has it: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def as_json(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value).replace("'", '"')


def implemented(api: Api, places: tuple[Place, ...], names: str) -> list[Field]:
    return [Field(name, api, places, None) for name in names.split()]


def ignored(api: Api, places: tuple[Place, ...], names: str, note: str) -> list[Field]:
    """Fields whose value never changes an answer of nibble's."""
    return [Field(name, api, places, ANYTHING, note) for name in names.split()]


def known(api: Api, places: tuple[Place, ...], name: str, note: str, *neutral: Any) -> list[Field]:
    return [Field(name, api, places, neutral, note)]


FIELDS: tuple[Field, ...] = (
    *implemented(
        "OpenAI",
        GENERATING,
        "model temperature top_p n stop seed logit_bias frequency_penalty presence_penalty max_tokens logprobs stream"
        " stream_options user prompt_cache_key",
    ),
    *implemented("OpenAI", ("completions",), "prompt best_of echo"),
    *implemented("OpenAI", ("chat",), "messages max_completion_tokens top_logprobs reasoning_effort tools tool_choice"
        " parallel_tool_calls",
    ),
    *implemented("OpenAI", GENERATING, "response_format"),
    *implemented("nibble", GENERATING, "grammar"),
    *implemented(
        "vLLM",
        GENERATING,
        "top_k min_p repetition_penalty stop_token_ids min_tokens ignore_eos skip_special_tokens return_token_ids"
        " truncate_prompt_tokens structured_outputs guided_json guided_regex guided_choice guided_grammar"
        " add_special_tokens priority",
    ),
    *implemented("vLLM", ("chat", "tokenize"), "add_generation_prompt continue_final_message chat_template_kwargs"),
    *implemented("vLLM", ("structured_outputs",), "json json_object regex choice grammar"),
    *implemented("OpenAI", ("embeddings",), "model input encoding_format user"),
    *implemented("vLLM", ("tokenize",), "model prompt messages add_special_tokens tools"),
    *implemented("vLLM", ("detokenize",), "model tokens"),
    *implemented("OpenAI", ("stream_options",), "include_usage"),
    *implemented("vLLM", ("stream_options",), "continuous_usage_stats"),
    *implemented("OpenAI", ("messages[]",), "role content name refusal tool_calls tool_call_id"),
    *implemented("OpenAI", ("content[]",), "type text"),
    *implemented(
        "OpenAI",
        RESPONSES,
        "model input instructions max_output_tokens temperature top_p tools tool_choice parallel_tool_calls text"
        " reasoning include top_logprobs metadata stream user prompt_cache_key",
    ),
    *implemented("OpenAI", ("text",), "format"),
    *implemented("OpenAI", ("reasoning",), "effort"),
    *implemented("OpenAI", ("message item",), "type role content"),
    *implemented("OpenAI", ("function_call item",), "type call_id name arguments"),
    *implemented("OpenAI", ("function_call_output item",), "type call_id output"),
    *implemented("OpenAI", ("reasoning item",), "type"),
    *implemented("OpenAI", ("input part",), "type text"),
    *implemented("vLLM", RESPONSES, "top_k repetition_penalty logit_bias seed stop ignore_eos priority"),
    *implemented("nibble", RESPONSES, "min_p frequency_penalty presence_penalty stop_token_ids min_tokens"),
    # OpenAI's that change nothing here.
    *ignored("OpenAI", GENERATING, "store metadata", "no answer is kept; what is logged is `logging.prompts`"),
    *ignored("OpenAI", ANSWERING, "service_tier", "there is one tier; `priority` above 0 waits behind other requests"),
    *ignored("OpenAI", ANSWERING, "safety_identifier", "as `user`: nobody is told"),
    *ignored("OpenAI", ANSWERING, "prompt_cache_retention", "the cache goes by the prompt itself"),
    *ignored("OpenAI", ("stream_options",), "include_obfuscation", "no chunk is padded"),
    *ignored("OpenAI", ("messages[]",), "annotations", "they point to sources of a message, and are no part of it"),
    *ignored("vLLM", ("messages[]",), "reasoning reasoning_content", "a model is not shown its earlier reasoning"),
    *ignored("vLLM", ("messages[]", "content[]"), "cache_control", "the cache goes by the prompt itself"),
    *ignored("OpenAI", RESPONSES, "store", "no answer is kept; what is logged is `logging.prompts`"),
    *ignored("OpenAI", RESPONSES, "prompt_cache_options", "the cache goes by the prompt itself"),
    *ignored("OpenAI", RESPONSES, "stream_options", "no event is padded, and the last one always has the usage"),
    *ignored("OpenAI", RESPONSES, "max_tool_calls", "it bounds the tools of a server, which has none here"),
    *ignored("OpenAI", ("reasoning",), "summary generate_summary", "no reasoning is told from the rest of the text"),
    *ignored("OpenAI", (*ITEMS, "reasoning item"), "id status", "nothing is stored that they would point to"),
    *ignored("OpenAI", ("message item",), "phase", "what a model writes is its content"),
    *ignored("OpenAI", ("function_call item",), "parsed_arguments", "the openai package puts it beside `arguments`"),
    *ignored("OpenAI", ("reasoning item",), "summary content encrypted_content",
        "a model is not shown its earlier reasoning",
    ),
    *ignored("OpenAI", ("input part",), "annotations logprobs", "they tell of a text, and are no part of it"),
    *ignored("OpenAI", ("input part",), "parsed", "the openai package puts it beside `text`"),
    # OpenAI's whose other values would change the answer.
    *known("OpenAI", RESPONSES, "previous_response_id", "no answer is kept; send the whole conversation as `input`"),
    *known("OpenAI", RESPONSES, "conversation", "no conversation is kept; send the whole of it as `input`"),
    *known("OpenAI", RESPONSES, "background", "no answer is kept that could be asked for later", False),
    *known("OpenAI", RESPONSES, "prompt", "no prompt template is kept; use `instructions`"),
    *known("OpenAI", RESPONSES, "truncation", "no item is left out of the input; send a shorter one", "disabled"),
    *known("OpenAI", RESPONSES, "context_management", "nothing is compacted; send a shorter input"),
    *known("OpenAI", RESPONSES, "moderation", "nothing is moderated"),
    *known("OpenAI", ("text",), "verbosity", "no model here was taught one; ask for it in a message", "medium"),
    *known("OpenAI", ("reasoning",), "context", "a model is not shown its earlier reasoning", "auto"),
    *known("OpenAI", ("reasoning",), "mode", "no model here has another one", "standard"),
    *known("OpenAI", ("completions",), "suffix", "nothing is inserted before a text"),
    *known("OpenAI", ("chat",), "functions", "use `tools`"),
    *known("OpenAI", ("chat",), "function_call", "use `tool_choice`", "none"),
    *known("OpenAI", ("messages[]",), "function_call", "use `tool_calls`"),
    *known("OpenAI", ("chat",), "modalities", "answers are text", ["text"]),
    *known("OpenAI", ("chat",), "audio", "answers are text"),
    *known("OpenAI", ("messages[]",), "audio", "messages are text"),
    *known("OpenAI", ("chat",), "prediction", "draft tokens come from `models[].openvino`"),
    *known("OpenAI", ("chat",), "verbosity", "no model here was taught one; ask for it in a message", "medium"),
    *known("OpenAI", ("chat",), "web_search_options", "nothing is searched"),
    *known("OpenAI", ("embeddings",), "dimensions", "an embedding has the model's own width"),
    # vLLM's that change nothing here.
    *ignored("vLLM", GENERATING, "spaces_between_special_tokens", "none are put where the text has none"),
    *ignored("vLLM", GENERATING, "guided_decoding_backend", "there is one"),
    *ignored("vLLM", ("chat",), "include_reasoning", "what a model writes is its content"),
    *ignored("vLLM", ("structured_outputs",), "disable_fallback backend", "there is one way to follow a grammar"),
    *known("vLLM", ("structured_outputs",), "disable_any_whitespace", "white space is one optional space", False),
    *known("vLLM", ("structured_outputs",), "disable_additional_properties", "say it in the schema", False),
    *known("vLLM", ("structured_outputs",), "whitespace_pattern", "white space is one optional space"),
    *known("vLLM", ("structured_outputs",), "structural_tag", "use `grammar`"),
    # vLLM's whose other values would change the answer.
    *known("vLLM", RESPONSES, "structured_outputs", "use `text.format`"),
    *known("vLLM", RESPONSES, "skip_special_tokens", "use /v1/chat/completions", True),
    *known("vLLM", RESPONSES, "include_stop_str_in_output", "a stop string is left out of the text", False),
    *known("vLLM", RESPONSES, "enable_response_messages", "use /v1/tokenize for the prompt's tokens", False),
    *known("vLLM", RESPONSES, "previous_input_messages", "send the whole conversation as `input`"),
    *known("vLLM", RESPONSES, "request_id", "send the header X-Request-Id"),
    *known("vLLM", RESPONSES, "cache_salt", "the prompt cache is shared by all keys"),
    *known("vLLM", GENERATING, "use_beam_search", "sequences are sampled; `best_of` chooses among them", False),
    *known("vLLM", GENERATING, "length_penalty", "it belongs to beam search", 1.0),
    *known("vLLM", GENERATING, "early_stopping", "it belongs to beam search", False),
    *known("vLLM", GENERATING, "include_stop_str_in_output", "a stop string is left out of the text", False),
    *known("vLLM", GENERATING, "allowed_token_ids", "use `grammar` or `logit_bias`"),
    *known("vLLM", GENERATING, "bad_words", "use `logit_bias` or `stop`"),
    *known("vLLM", GENERATING, "prompt_logprobs", "use `echo` with `logprobs` of /v1/completions"),
    *known("vLLM", GENERATING, "return_tokens_as_token_ids", "use `return_token_ids`", False),
    *known("vLLM", GENERATING, "request_id", "send the header X-Request-Id"),
    *known("vLLM", GENERATING, "logits_processors", "no code is taken from a request"),
    *known("vLLM", GENERATING, "cache_salt", "the prompt cache is shared by all keys"),
    *known("vLLM", GENERATING, "kv_transfer_params", "no KV cache is moved between servers"),
    *known("vLLM", GENERATING, "vllm_xargs", "there are no custom arguments"),
    *known("vLLM", GENERATING, "guided_whitespace_pattern", "white space is one optional space between values"),
    *known("vLLM", ("completions",), "prompt_embeds", "a prompt is text or token ids"),
    *known("vLLM", ("chat",), "echo", "use /v1/completions", False),
    *known("vLLM", ("chat", "tokenize"), "chat_template", "the template is the checkpoint's own"),
    *known("vLLM", ("chat",), "documents", "put them into a message"),
    *known("vLLM", ("chat", "tokenize"), "mm_processor_kwargs", "messages are text"),
    *known("vLLM", ("chat",), "thinking_token_budget", "no reasoning is told from the rest of the text"),
    *known("vLLM", ("tokenize",), "return_token_strs", "use /v1/detokenize", False),
    *known("vLLM", ("embeddings",), "add_special_tokens", "send token ids instead", True),
    *known("vLLM", ("embeddings",), "truncate_prompt_tokens", "shorten the input"),
    *known("vLLM", ("embeddings",), "normalize", "a vector is the model's hidden state as it is", False),
    *known("vLLM", ("embeddings",), "priority", "embeddings are not put behind other requests", 0),
)  # fmt: skip


def fields_of(place: Place) -> dict[str, Field]:
    return {field.name: field for field in FIELDS if place in field.places}


BY_PLACE: dict[Place, dict[str, Field]] = {
    place: fields_of(place) for place in {place for field in FIELDS for place in field.places}
}
