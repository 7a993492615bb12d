"""The Python client on a running cluster: the same answers over both protocols, streamed or not."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidRequestError, ModelNotFoundError
from cluster.families import FAMILIES, FAMILY_NAMES
from deployments.client import AsyncNibbleClient, NibbleClient
from tests.integration.processes import Served

MESSAGES = [{"role": "user", "content": "What is CPU?"}]


def urls(served: Served) -> tuple[str, str]:
    return served.http, f"grpc://{served.grpc}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_both_protocols_give_the_same_completion_to_the_last_bit(served: Served, family: str) -> None:
    prompt = FAMILIES[family].demo_prompt
    options = {"max_tokens": 30, "temperature": 1.5, "seed": 7, "logprobs": 3, "n": 2}
    wholes = []
    for url in urls(served):
        with NibbleClient(url) as client:
            wholes.append(client.complete(family, prompt, **options))
            stream = client.stream(family, prompt, **options)
            texts = ["", ""]
            for piece in stream:
                texts[piece.index] += piece.text
            assert texts == [choice.text for choice in wholes[-1].choices]
            assert stream.usage == wholes[-1].usage
    assert wholes[0] == wholes[1]
    assert texts[0] != texts[1]


def test_the_rest_is_the_same_too(served: Served) -> None:
    found = []
    for url in urls(served):
        with NibbleClient(url) as client:
            assert client.ready()
            tokens = client.tokenize("llama", "What is CPU?")
            found.append(
                (
                    client.chat("llama", MESSAGES, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2),
                    "".join(
                        piece.text for piece in client.stream_chat("llama", MESSAGES, max_tokens=20, temperature=0)
                    ),
                    client.complete("llama", ["What", "Who"], max_tokens=5, temperature=0, echo=True),
                    client.complete("llama", tokens.tokens, max_tokens=5, temperature=0),
                    tokens,
                    client.detokenize("llama", tokens.tokens),
                    client.embed("llama", ["What is CPU?", "A"]),
                    client.models(),
                )
            )
    assert found[0] == found[1]
    assert found[0][0].text == found[0][1]
    assert "What is CPU?" in found[0][5]


async def test_errors_and_early_ends_for_asyncio(served: Served) -> None:
    for url in urls(served):
        async with AsyncNibbleClient(url) as client:
            with pytest.raises(ModelNotFoundError, match="served are"):
                await client.complete("gpt-5", "a")
            with pytest.raises(InvalidRequestError) as error:
                await client.complete("llama", "a", temperature=9)
            assert error.value.field == "temperature"
            # `narrow` runs one request at a time: the next one is answered since the one before has ended.
            for _ in range(3):
                async with client.stream("narrow", "Q:", max_tokens=400, temperature=2, ignore_eos=True) as stream:
                    assert (await anext(stream)).index == 0
            answer = await client.complete("narrow", "Q:", max_tokens=1, request_id="mine")
            assert answer.request_id == "mine"
