"""What a client may ask for, over HTTP and gRPC alike: OpenAI's names, vLLM's extensions, the ranges nibble accepts.

A field this version does not know is refused rather than ignored. An optional field given as null counts as left out,
as OpenAI has it. The same classes make the OpenAPI document, so it says what is accepted and nothing else.
"""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError
from deployments.records import Conversation, GenerationRequest, Grammar, Message, Prompt, SamplingParams

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

# Of the golden ratio, odd: it spreads the seeds of a request's further choices over all of 64 bits.
SEED_STEP = 0x9E3779B97F4A7C15

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
# A field of OpenAI's that nibble has not: null is fine, anything else is refused by its name.
Unsupported = Annotated[None, Field(description="Not supported; leave it out.")]


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelBody(Body):
    model: str

    def check(self) -> None:
        """Raises InvalidRequestError for fields that do not go together."""


class StreamOptions(Body):
    include_usage: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    # `schema` is a method of pydantic's own.
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


BIASED_ID = "^[0-9]{1,9}$"
Bias = Annotated[float, Field(ge=-100, le=100)]


def logit_bias_schema(schema: dict[str, Any]) -> None:
    """pydantic's own says nothing of names that do not fit the pattern."""
    schema["propertyNames"] = {"pattern": BIASED_ID}
    schema["additionalProperties"] = schema.pop("patternProperties")[BIASED_ID]


class GeneratingBody(ModelBody):
    """What completions and chat completions share."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 30, description="-1 and 0: off.")] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=BIASED_ID)], Bias], Field(json_schema_extra=logit_bias_schema)
    ] = {}
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        BeforeValidator(
            one_is_a_list, json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
        ),
    ] = []
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, Field(min_length=1, description="Lark's or GBNF's syntax.")] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: Unsupported = None
    store: Unsupported = None
    metadata: Unsupported = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @abstractmethod
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """The most new tokens asked for; None: as many as the context holds."""

    @property
    def sequences(self) -> int:
        """To generate for each prompt."""
        return self.n

    def check(self) -> None:
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequestError(
                f"min_tokens: found {self.min_tokens}, allowed are 0 to max_tokens, {limit}", "min_tokens"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: allowed only with stream: true", "stream_options")
        if self.grammar is not None and self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequestError("grammar: not together with response_format; send one of them", "grammar")

        if self.ignore_eos and self.required_grammar() is not None:
            raise InvalidRequestError("ignore_eos: not with a format or grammar, whose text has an end", "ignore_eos")

    def required_grammar(self) -> Grammar | None:
        if self.grammar is not None:
            return Grammar("grammar", self.grammar, "grammar")
        match self.response_format:
            case JsonObjectFormat():
                return Grammar("json_schema", '{"type":"object"}', "response_format")
            case JsonSchemaFormat(json_schema=named):
                return Grammar("json_schema", json.dumps(named.json_schema), "response_format")
        return None

    def generations(self, id: str, limits: LimitsConfig, **fields: Any) -> list[GenerationRequest]:
        """The records that go to replicas: for each prompt as many as `sequences`, in order. Without a seed they get a
        random one, so that even then another replica could draw the same tokens.

        Raises InvalidRequestError for what is beyond `limits`.
        """
        prompts, max_tokens = self.prompts(), self.token_limit
        count = len(prompts) * self.sequences
        if count > limits.choices:
            field = "prompt" if len(prompts) > 1 else "n"
            raise InvalidRequestError(f"{field}: this asks for {count} sequences, allowed are {limits.choices}", field)
        if limits.max_tokens is not None:
            asked = self.model_fields_set & {"max_tokens", "max_completion_tokens"}
            if asked and max_tokens is not None and max_tokens > limits.max_tokens:
                raise InvalidRequestError(
                    f"max_tokens: found {max_tokens}, allowed are up to {limits.max_tokens}", "max_tokens"
                )
            max_tokens = min(limits.max_tokens, limits.max_tokens if max_tokens is None else max_tokens)
        seed = self.seed if self.seed is not None else secrets.randbits(63)
        grammar = self.required_grammar()
        return [
            GenerationRequest(
                request_id=f"{id}-{index}" if count > 1 else id,
                prompt=prompt,
                max_tokens=max_tokens,
                stop=tuple(self.stop),
                sampling=self.sampling((seed + choice * SEED_STEP) % (1 << 64)),
                ignore_eos=self.ignore_eos,
                grammar=grammar,
                timeout_s=limits.timeout_s,
                max_prompt_tokens=limits.prompt_tokens,
                **fields,
            )
            for index, (prompt, choice) in enumerate((p, c) for p in prompts for c in range(self.sequences))
        ]

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            min_tokens=self.min_tokens,
            seed=seed,
        )


class CompletionRequest(GeneratingBody):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Unsupported = None

    def prompts(self) -> Sequence[Prompt]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def sequences(self) -> int:
        return self.best_of if self.best_of is not None else self.n

    def check(self) -> None:
        super().check()
        if self.sequences < self.n:
            raise InvalidRequestError(f"best_of: found {self.best_of}, allowed are n, {self.n}, and more", "best_of")
        if self.stream and self.sequences > self.n:
            raise InvalidRequestError(
                "best_of: a stream cannot choose among whole completions; send stream: false", "best_of"
            )

    def completions(self, id: str, limits: LimitsConfig) -> list[GenerationRequest]:
        # The choice among more sequences than are wanted goes by their log probabilities.
        logprobs = 0 if self.logprobs is None and self.sequences > self.n else self.logprobs
        return self.generations(id, limits, echo=self.echo, logprobs=logprobs)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(GeneratingBody):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    parallel_tool_calls: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def prompts(self) -> Sequence[Prompt]:
        return [Conversation(tuple(message.message() for message in self.messages))]

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs: allowed only with logprobs: true", "top_logprobs")

    def completions(self, id: str, limits: LimitsConfig) -> list[GenerationRequest]:
        return self.generations(id, limits, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(ModelBody):
    """The body of POST /v1/tokenize: text, or a conversation as the model's chat template writes it."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt: exactly one of prompt and messages is needed", "prompt")

    def text(self) -> str | Conversation:
        if self.messages is not None:
            return Conversation(tuple(message.message() for message in self.messages))
        assert self.prompt is not None, "check() has seen to it"
        return self.prompt


class DetokenizeRequest(ModelBody):
    """The body of POST /v1/detokenize."""

    tokens: list[TokenId]


class EmbeddingRequest(ModelBody):
    """The body of POST /v1/embeddings."""

    input: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Unsupported = None
    user: str | None = None

    def inputs(self) -> list[str | tuple[int, ...]]:
        return CompletionRequest(model=self.model, prompt=self.input).prompts()  # type: ignore[return-value]
