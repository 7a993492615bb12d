"""What a client may ask for, over HTTP and gRPC alike: OpenAI's names, vLLM's extensions, the ranges nibble accepts.

The same classes make the OpenAPI document, so it says what is accepted and nothing else. What becomes of the fields
that are not here says `fields.py`.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body, ModelBody, TokenId, TokenIds
from deployments.api.requests.formats import FormattedBody
from deployments.api.requests.messages import ConversationBody, Messages
from deployments.api.requests.tools import AllowedToolsChoice, ToolChoice, tool_use
from deployments.records import Conversation, GenerationRequest, Prompt, SamplingParams, Tool, ToolUse

MAX_STOPS = 128  # strings, and token ids too
MAX_STOP_LENGTH = 256
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

# Of prompt_cache_key.
SESSION = "Requests of one value go to one replica, whose cache has their prompts, as far as it is not too busy."

# Of the golden ratio, odd: it spreads the seeds of a request's further choices over all of 64 bits.
SEED_STEP = 0x9E3779B97F4A7C15

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31, description="Above 0: class batch, else interactive.")]


class StreamOptions(Body):
    """`continuous_usage_stats`: each chunk has the usage so far of its own choice; with `include_usage` only."""

    place = "stream_options"

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


BIASED_ID = "^[0-9]{1,9}$"
Bias = Annotated[float, Field(ge=-100, le=100)]


def logit_bias_schema(schema: dict[str, Any]) -> None:
    """pydantic's own says nothing of names that do not fit the pattern."""
    schema["propertyNames"] = {"pattern": BIASED_ID}
    schema["additionalProperties"] = schema.pop("patternProperties")[BIASED_ID]


class SampledBody(ModelBody):
    """How the tokens of a completion are drawn, and where it ends."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 30, description="-1 and 0: off.")] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=BIASED_ID)], Bias], Field(json_schema_extra=logit_bias_schema)
    ] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        BeforeValidator(
            one_is_a_list, json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
        ),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    ignore_eos: bool = False


class GeneratingBody(FormattedBody, SampledBody):
    """What completions and chat completions share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=1 << 20, description="-1: to what fits.")] | None = None
    priority: Priority = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_cache_key: Annotated[str, Field(description=SESSION)] | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def batch(self) -> bool:
        """Whether it waits behind all interactive requests: vLLM's `priority`, where lower values go first. Nobody can
        get ahead of the default by it."""
        return self.priority > 0

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
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens: found 0, allowed are -1 (to what fits) and 1 and more",
                "truncate_prompt_tokens",
            )
        if self.required_grammar() is not None and self.ignore_eos:
            raise InvalidRequestError("ignore_eos: not with a format or grammar, whose text has an end", "ignore_eos")

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
                stop_token_ids=tuple(self.stop_token_ids),
                sampling=self.sampling((seed + choice * SEED_STEP) % (1 << 64)),
                ignore_eos=self.ignore_eos,
                skip_special_tokens=self.skip_special_tokens,
                return_token_ids=self.return_token_ids,
                truncate_prompt_tokens=self.truncate_prompt_tokens,
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

    place = "completions"

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_special_tokens: bool = True

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
        fields = {"echo": self.echo, "add_special_tokens": self.add_special_tokens}
        return self.generations(id, limits, logprobs=logprobs, **fields)


class ChatRequest(ConversationBody, GeneratingBody):
    """The body of POST /v1/chat/completions. `reasoning_effort` is told to the chat template."""

    place = "chat"

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    def prompts(self) -> Sequence[Prompt]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return [self.conversation(self.messages, **effort)]

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def check(self) -> None:
        super().check()
        self.check_conversation(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs: allowed only with logprobs: true", "top_logprobs")
        use = self.tool_use()
        if use is not None and (grammar := self.required_grammar()) is not None:
            raise InvalidRequestError(
                f'{grammar.field}: not together with tools; send tool_choice "none" with it', grammar.field
            )
        if use is not None and use.forced and self.ignore_eos:
            raise InvalidRequestError("ignore_eos: not with a tool_choice that forces a call", "ignore_eos")

    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def told_tools(self) -> tuple[Tool, ...]:
        """Of tools that it may not call the model is not told."""
        choice, tools = self.tool_choice, super().told_tools()
        if isinstance(choice, AllowedToolsChoice):
            return tuple(tool for tool in tools if tool.name in choice.allowed_tools.names)
        return () if choice == "none" else tools

    def completions(self, id: str, limits: LimitsConfig) -> list[GenerationRequest]:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.generations(id, limits, logprobs=logprobs, tool_use=self.tool_use())


class TokenizeRequest(ConversationBody, ModelBody):
    """The body of POST /v1/tokenize: text, or a conversation as the model's chat template writes it."""

    place = "tokenize"

    prompt: str | None = None
    messages: Messages | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt: exactly one of prompt and messages is needed", "prompt")
        self.check_conversation(self.messages or [])

    def text(self) -> str | Conversation:
        if self.messages is not None:
            return self.conversation(self.messages)
        assert self.prompt is not None, "check() has seen to it"
        return self.prompt


class DetokenizeRequest(ModelBody):
    """The body of POST /v1/detokenize."""

    place = "detokenize"

    tokens: list[TokenId]


class EmbeddingRequest(ModelBody):
    """The body of POST /v1/embeddings."""

    place = "embeddings"

    input: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    def inputs(self) -> list[str | tuple[int, ...]]:
        return CompletionRequest(model=self.model, prompt=self.input).prompts()  # type: ignore[return-value]
