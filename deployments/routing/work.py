"""How many tokens a completion will take, before a tokenizer or a model has seen it."""

from __future__ import annotations

from deployments.records import Conversation, FinishReason, GenerationRequest, Prompt

# Of about so many of the last completions.
COMPLETIONS = 64
# Of English text; what the model's own tokenizer makes of its prompts is measured from the first completion on.
CHARACTERS_A_TOKEN = 4.0


def characters(prompt: str | Conversation) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    told = sum(len(message.content) for message in prompt.messages)
    return told + sum(len(tool.definition) for tool in prompt.tools)


class WorkEstimate:
    """Of one model. Sums give older completions less weight."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._characters, self._prompt_tokens = CHARACTERS_A_TOKEN * 100, 100.0
        self._generated = self._ended = 0.0

    def of(self, request: GenerationRequest) -> int:
        """Estimated tokens of the prompt and the completion, 1 to the context."""
        return self.of_prompt(request.prompt, self._completion(request.max_tokens))

    def of_prompt(self, prompt: Prompt, further: int = 0) -> int:
        """With so many further tokens."""
        if isinstance(prompt, tuple):
            tokens = len(prompt)
        else:
            tokens = round(characters(prompt) * self._prompt_tokens / self._characters)
        return max(1, min(self.context, tokens + further))

    def learn(self, prompt: Prompt, prompt_tokens: int, completion_tokens: int, reason: FinishReason | None) -> None:
        """Of a completion that ended; `reason` None: its client left."""
        keep = 1 - 1 / COMPLETIONS
        if not isinstance(prompt, tuple):
            self._characters = self._characters * keep + characters(prompt)
            self._prompt_tokens = self._prompt_tokens * keep + prompt_tokens
        self._generated = self._generated * keep + completion_tokens
        self._ended = self._ended * keep + (reason not in (None, "length"))

    def _completion(self, max_tokens: int | None) -> int:
        """What was asked for, at most the mean length. Completions that were cut short, by max_tokens or by a client
        that left, would have been longer: they count with what they generated, but not as one that has ended (the
        maximum likelihood estimate of an exponential distribution with censored observations)."""
        most = self.context if max_tokens is None else max_tokens
        return most if self._ended == 0 else min(most, round(self._generated / self._ended))
