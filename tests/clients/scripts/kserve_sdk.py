"""KServe's SDK, over REST and gRPC, against the server at the addresses given; prints what it was answered as one line
of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

PROMPT = "Q: What is CPU? A:"


def request() -> InferRequest:
    inputs = [InferInput("text_input", [1], "BYTES", [PROMPT])]
    # Over gRPC the SDK has no numbers with a fraction.
    return InferRequest("llama", inputs, parameters={"max_tokens": 24, "temperature": "0"})


def text_of(response: Any) -> str:
    value = response.get_output_by_name("text_output").data[0]
    return value.decode() if isinstance(value, bytes) else value


async def main(http: str, grpc: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=1)) as client:
        found["rest"] = {
            "live": await client.is_server_live(http),
            "models_ready": [await client.is_model_ready(http, name) for name in ("llama", "gpt-5")],
            "text": text_of(await client.infer(http, request(), model_name="llama")),
        }
    async with InferenceGRPCClient(grpc) as client:
        found["grpc"] = {
            "live": await client.is_server_live(),
            "models_ready": [await client.is_model_ready(name) for name in ("llama", "gpt-5")],
            "text": text_of(await client.infer(request())),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
