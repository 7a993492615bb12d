"""A gRPC server of a few lines for tests of clients: it echoes words, and fails as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status.rpc_status import to_status

from cluster.errors import NibbleError
from deployments.error_statuses import headers_of, rpc_status, status_of
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer


class Servicer(InferenceServicer):
    """Echoes words as EchoModel does; raises `error` instead, in a stream after the first word. `answer`: a stream's
    choices instead, which together are the whole answer."""

    def __init__(self) -> None:
        self.error: NibbleError | None = None
        self.answer: list[Any] = []
        self.details = False  # whether an error has google.rpc's details
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.left = threading.Event()

    def _begin(self, request: Any, context: Any) -> list[str]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        context.set_trailing_metadata([("x-request-id", self.metadata.get("x-request-id", "made"))])
        chat = request.WhichOneof("input") == "chat"
        return list((request.chat.messages[-1].content if chat else request.prompt).split())

    def _fail(self, context: Any) -> None:
        if self.error is not None:
            hints = [(name.lower(), value) for name, value in headers_of(self.error).items()]
            details = to_status(rpc_status(self.error)).trailing_metadata if self.details else ()
            context.set_trailing_metadata([*hints, *details])
            context.abort(status_of(self.error).grpc, str(self.error))

    def _choice(self, request: Any, words: list[str], start: int, last: bool) -> Any:
        text, offset, logged = "", 0, []
        for index, word in enumerate(words, start):
            top = [pb.TopLogprob(id=0, token=b"zero", logprob=-1.0)][: request.logprobs]
            logged.append(
                pb.TokenLogprob(id=index, token=f"{word} ".encode(), logprob=-0.5, top=top, text_offset=offset)
            )
            text += word + " "
            offset += len(word) + 1
        return pb.Choice(
            index=0,
            text=text,
            finish_reason="stop" if last else None,
            logprobs=logged if request.HasField("logprobs") else (),
        )

    def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        words = self._begin(request, context)
        self._fail(context)
        usage = pb.Usage(prompt_tokens=len(words), completion_tokens=len(words), total_tokens=2 * len(words))
        choice = whole(self.answer) if self.answer else self._choice(request, words, 0, True)
        return pb.GenerateResponse(id="made", model=request.model, choices=[choice], usage=usage)

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        words = self._begin(request, context)
        context.add_callback(self.left.set)
        for choice in self.answer:
            yield pb.GenerateStreamResponse(id="made", model=request.model, choice=choice)
        for index, word in enumerate(() if self.answer else words):
            last = index == len(words) - 1
            usage = pb.Usage(prompt_tokens=len(words), completion_tokens=len(words), total_tokens=2 * len(words))
            yield pb.GenerateStreamResponse(
                id="made",
                model=request.model,
                choice=self._choice(request, [word], index, last),
                usage=usage if last else None,
            )
            if words[0] == "endless":
                self.left.wait(30)
            self._fail(context)

    def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        words = self._begin(request, context)
        return pb.TokenizeResponse(
            tokens=[1] * request.add_special_tokens + [len(word) for word in words], max_model_len=512
        )

    def Detokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.DetokenizeResponse(prompt=" ".join("x" * id for id in request.tokens))

    def Embed(self, request: Any, context: Any) -> Any:  # noqa: N802
        counts = [len(each.text.split()) or len(each.tokens.ids) for each in request.inputs]
        answer = pb.EmbedResponse(model=request.model, prompt_tokens=sum(counts))
        for count in counts:
            answer.embeddings.add(values=[0.5, -1.0, count])
        return answer

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        one = {"family": "llama", "engine": "bigdl", "quantization": "q4_0", "context": 512}
        return pb.ListModelsResponse(
            models=[pb.Model(id="echo", ready=True, **one), pb.Model(id="absent", ready=False, **one)]
        )


def whole(pieces: list[Any]) -> Any:
    """The choice that a stream's pieces are of."""
    choice = pb.Choice(text="".join(piece.text for piece in pieces), finish_reason=pieces[-1].finish_reason)
    for call in (call for piece in pieces for call in piece.tool_calls):
        if call.id:
            choice.tool_calls.append(call)
        else:
            choice.tool_calls[call.index].arguments += call.arguments
    return choice


class Health(health_pb2_grpc.HealthServicer):
    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
