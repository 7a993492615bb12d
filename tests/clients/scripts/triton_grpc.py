"""Triton's gRPC client against the server at the address given; prints what it was answered as one line of JSON."""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

PROMPT = "Q: What is CPU? A:"
GREEDY = {"max_tokens": 24, "temperature": 0.0}


def texts(*values: str) -> triton.InferInput:
    tensor = triton.InferInput("text_input", [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], dtype=object))
    return tensor


def text_of(result: triton.InferResult) -> list[str]:
    return [value.decode() for value in result.as_numpy("text_output")]


def streamed(client: triton.InferenceServerClient) -> str:
    """The pieces of one answer together."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer("llama", [texts(PROMPT)], parameters={**GREEDY, "stream": True})
    pieces = []
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            raise error
        pieces += text_of(result)
        if result.get_response().parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return "".join(pieces)


def main(address: str) -> dict[str, Any]:
    with triton.InferenceServerClient(address) as client:
        found: dict[str, Any] = {
            "live": client.is_server_live(),
            "models_ready": [client.is_model_ready(name) for name in ("llama", "gpt-5")],
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata("llama", as_json=True),
            "config": client.get_model_config("llama", as_json=True)["config"],
            "index": client.get_model_repository_index(as_json=True)["models"],
        }
        before = client.get_inference_statistics("llama", as_json=True)["model_stats"][0]
        found["texts"] = text_of(client.infer("llama", [texts(PROMPT, "A")], parameters=GREEDY))
        found["streamed"] = streamed(client)
        after = client.get_inference_statistics("llama", as_json=True)["model_stats"][0]
        found["statistics"] = [before, after]
        found["everyone"] = [each["name"] for each in client.get_inference_statistics(as_json=True)["model_stats"]]
        try:
            client.get_model_config("gpt-5")
        except triton.InferenceServerException as error:
            found["refused"] = [error.status(), error.message()]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
