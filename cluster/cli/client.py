"""What asks a running server as any client does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.options import plain_console
from cluster.cli.urls import DEFAULT_GRPC, DEFAULT_URL, URL_HELP, client_url, default_url, with_scheme
from cluster.errors import ConfigError

app = typer.Typer()

ModelName = Annotated[str, typer.Argument(help="A served model's name.")]
Grpc = Annotated[bool, typer.Option("--grpc", help="Ask over gRPC.")]
Url = Annotated[str | None, typer.Option(help=URL_HELP)]
MaxTokens = Annotated[int, typer.Option(help="Of each answer, at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option()]
TopK = Annotated[int, typer.Option(help="0 is off.")]
Seed = Annotated[int | None, typer.Option()]
System = Annotated[str | None, typer.Option(help="What the chat's system message says.")]
STANDARD_INPUT = "-"


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help=f"{STANDARD_INPUT} reads it from standard input.")],
    grpc: Grpc = False,
    url: Url = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is generated.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    system: System = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
) -> None:
    """One completion from a running cluster. An API key is taken from the environment's NIBBLE_API_KEY."""
    from cluster.commands.generate import conversation, generate

    options = sampling_options(max_tokens, temperature, top_p, top_k, seed) | {"stop": stop or []}
    if prompt == STANDARD_INPUT:
        prompt = standard_input()
    messages = conversation(prompt, system) if chat or system is not None else None
    for text in generate(client_url(url, grpc), model, prompt, stream, options, messages):
        print(text, end="", flush=True)
    print()


def sampling_options(max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None) -> dict[str, Any]:
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return options if seed is None else options | {"seed": seed}


def standard_input() -> str:
    """All of it, without the line's end that `echo` and here-documents put there."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt: standard input is not UTF-8: {error}") from None


@app.command()
def chat(
    model: ModelName,
    grpc: Grpc = False,
    url: Url = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """A conversation with a model of a running cluster. An API key is taken from the environment's NIBBLE_API_KEY."""
    from cluster.commands.chat import chat

    options = sampling_options(max_tokens, temperature, top_p, top_k, seed)
    chat(client_url(url, grpc), model, system, options, plain_console())


@app.command()
def bench(
    model: ModelName,
    url: Annotated[
        list[str] | None,
        typer.Option(help=f"May be given several times. Default {DEFAULT_URL}, with --grpc {DEFAULT_GRPC}."),
    ] = None,
    grpc: Annotated[bool, typer.Option("--grpc", help="URLs without a scheme are gRPC's.")] = False,
    compare: Annotated[str | None, typer.Option(help="A server to measure in turn; ratios to it are shown.")] = None,
    compare_model: Annotated[str | None, typer.Option(help="The model's name there. Default: the same.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Closed loops of so many workers. Default 1,4,8,16.")] = None,
    rate: Annotated[str | None, typer.Option(help="Open loops of so many requests a second: 0.5,2.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each completion.")] = 32,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Of each run. Default: 4 a worker, or for 10 s at a rate; at least 8.")
    ] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds in which a run begins requests.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each load; the tables have their medians.")] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="First requests to each server, which do not count.")] = 4,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds after which a run is ended.")] = 600,
    seed: Annotated[int | None, typer.Option(help="Of prompts and arrivals. Default: a new one each time.")] = None,
    vocabulary: Annotated[int, typer.Option(min=4, help="Prompts are token ids from 3 to below it.")] = 500,
    text_prompts: Annotated[bool, typer.Option("--text-prompts", help="Prompts are words, not token ids.")] = False,
    prompt_file: Annotated[Path | None, typer.Option(help="Prompts are this file's lines.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures, settings and the machine to this file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="With every request, in the JSON.")] = False,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw the figures: NAME.png or NAME.svg; may be given twice.")
    ] = None,
) -> None:
    """Load for any OpenAI-compatible server and for nibble over gRPC: throughput, time to first token, latency.

    API keys are taken from the environment: NIBBLE_API_KEY, for --compare first NIBBLE_COMPARE_API_KEY.
    """
    from cluster.commands.bench import Options, bench

    options = Options(
        model=model,
        urls=[with_scheme(each, grpc) for each in url or [default_url(grpc)]],
        compare=None if compare is None else with_scheme(compare, grpc),
        compare_model=compare_model,
        concurrency=concurrency,
        rate=rate,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests,
        duration=duration,
        rounds=rounds,
        warmup=warmup,
        time_limit=time_limit,
        seed=seed,
        vocabulary=vocabulary,
        text_prompts=text_prompts,
        prompt_file=prompt_file,
        json=json,
        raw=raw,
        plots=plot or [],
    )
    bench(options, plain_console())


@app.command()
def models(
    grpc: Grpc = False,
    url: Url = None,
) -> None:
    """The models that a cluster serves."""
    from cluster.commands.generate import models

    models(client_url(url, grpc), plain_console())
