"""The command line: arguments, defaults and exit codes. What a subcommand does is in `cluster/commands/`.

Imports of Ray and of the engines wait until a subcommand needs them: `nibble generate` starts in a moment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.config import QUANTIZATIONS, ArtifactsConfig, default_config, load_config
from cluster.errors import ConfigError, NibbleError
from cluster.families import family_named
from cluster.option_prefixes import PrefixCommand

app = typer.Typer(
    help="INT4 inference of Hugging Face language models on clusters of plain CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_GRPC = "127.0.0.1:9000"

Address = Annotated[str | None, typer.Option(help="A running Ray cluster to use, HOST:PORT or auto.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the checkpoint and say what it needs; change nothing.")]
FAMILY_HELP = "llama, gptneox, bloom or starcoder."


def plain_console() -> Console:
    """Prints text as it is: a model's answer may hold [brackets], and builtin:llama is no emoji."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


@app.command(cls=PrefixCommand)
def pipeline(
    thread_num: Annotated[int, typer.Option(help="Threads of the engine.")] = 2,
    model_family: Annotated[str, typer.Option(help=FAMILY_HELP)] = "llama",
    repo_id_or_model_path: Annotated[
        str | None, typer.Option(help="Hub repository, folder or builtin:FAMILY. Default: the family's Hub repository.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The prompt.")] = "Q: What is CPU? A:",
    tmp_path: Annotated[
        str | None, typer.Option(help="Accepted as the example has it; no intermediate model is written.")
    ] = None,
) -> None:
    """BigDL-LLM's native INT4 example: convert, load, infer three ways. Options may be abbreviated: --promp."""
    from cluster.commands.pipeline import pipeline

    family = family_named(model_family)
    pipeline(family.name, repo_id_or_model_path or family.default_repo, prompt, thread_num, plain_console())


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Hub repository, folder or builtin:FAMILY.")],
    family: Annotated[str, typer.Option(help=FAMILY_HELP)],
    quantization: Annotated[str, typer.Option(help="int4, or int8 (not for bloom).")] = "int4",
    output: Annotated[Path | None, typer.Option(help="A new folder. Default: bigdl_llm_FAMILY_TYPE.")] = None,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Convert a checkpoint to INT4 or int8, on this machine or with --address on a Ray cluster; write the artifact."""
    from cluster.commands.convert import convert

    name = family_named(family).name
    ggml_type = QUANTIZATIONS.get(quantization)  # type: ignore[call-overload]
    if ggml_type is None:
        raise ConfigError(f"quantization: found {quantization!r}, allowed are {', '.join(QUANTIZATIONS)}")
    target = output or Path(f"bigdl_llm_{name}_{ggml_type}")
    convert(checkpoint, name, ggml_type, target, address, plain_console(), dry_run)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="YAML. Without it: the four built-in demo models.")] = None,
    address: Address = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of Ray's workers.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Convert the models, deploy them and serve HTTP and gRPC until Ctrl-C."""
    from cluster.commands.serve import serve

    serve(load_config(config) if config else default_config(), address, plain_console(), verbose, dry_run)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A served model's name.")],
    prompt: Annotated[str, typer.Argument()],
    grpc: Annotated[bool, typer.Option("--grpc", help="Ask over gRPC.")] = False,
    url: Annotated[str | None, typer.Option(help=f"Default {DEFAULT_URL}, with --grpc {DEFAULT_GRPC}.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is generated.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="What the chat's system message says.")] = None,
    max_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
) -> None:
    """One completion from a running cluster. An API key is taken from the environment's NIBBLE_API_KEY."""
    from cluster.commands.generate import conversation, generate

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "stop": stop or []}
    if seed is not None:
        options["seed"] = seed
    messages = conversation(prompt, system) if chat or system is not None else None
    for text in generate(client_url(url, grpc), model, prompt, stream, options, messages):
        print(text, end="", flush=True)
    print()


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A served model's name.")],
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
        urls=[each if "://" in each else client_url(each, grpc) for each in url or [default_url(grpc)]],
        compare=compare if compare is None or "://" in compare else client_url(compare, grpc),
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
def tune(
    config: Annotated[Path, typer.Argument(help="YAML, as for `nibble serve`.")],
    model: Annotated[str | None, typer.Argument(help="Which of its models. Default: the only one.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients, which the replicas share evenly.")] = 8,
    requests: Annotated[int | None, typer.Option(min=1, help="Of each round. Default: 2 a client.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt, no two the same.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each completion.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="The table has their medians.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Write the best split into CONFIG.")] = False,
) -> None:
    """Try replicas x threads of a model on this node: tokens/s and latency of each split of its cores."""
    from cluster.commands.tune import tune
    from deployments.engines.measure import Load

    load = Load(
        concurrency=concurrency,
        requests=requests or 2 * concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    tune(config, model, load, rounds, write, plain_console())


def client_url(url: str | None, grpc: bool) -> str:
    """With its scheme, which need not be given for gRPC."""
    target = url or default_url(grpc)
    if not grpc or target.startswith(("grpc://", "grpcs://")):
        return target
    return f"grpc://{target}"


def default_url(grpc: bool) -> str:
    return DEFAULT_GRPC if grpc else DEFAULT_URL


@app.command()
def models(
    grpc: Annotated[bool, typer.Option("--grpc", help="Ask over gRPC.")] = False,
    url: Annotated[str | None, typer.Option(help=f"Default {DEFAULT_URL}, with --grpc {DEFAULT_GRPC}.")] = None,
) -> None:
    """The models that a cluster serves."""
    from cluster.commands.generate import models

    models(client_url(url, grpc), plain_console())


@app.command()
def status(address: Address = None) -> None:
    """Nodes, replicas, conversions and artifacts of a cluster, and what it waits for."""
    from cluster.noted import noted_address

    address = address or noted_address()  # before Ray is imported
    from cluster.commands.status import status
    from cluster.ray_cluster import joined_cluster

    with joined_cluster(address):
        status(plain_console())


artifacts = typer.Typer(help="What is kept in node caches and the durable copy.", no_args_is_help=True)
app.add_typer(artifacts, name="artifacts")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML whose artifacts: to use. Default: none.")]


def artifacts_config(path: Path | None) -> ArtifactsConfig:
    return load_config(path).artifacts if path else ArtifactsConfig()


@artifacts.command("list")
def list_(config: ConfigFile = None, address: Address = None) -> None:
    """Every artifact and where it is kept."""
    from cluster.commands.artifacts import list_artifacts

    list_artifacts(artifacts_config(config), address, plain_console())


@artifacts.command()
def verify(config: ConfigFile = None, address: Address = None) -> None:
    """Read every copy whole and compare it with its manifest; exit code 1 where one is damaged."""
    from cluster.commands.artifacts import verify_artifacts

    verify_artifacts(artifacts_config(config), address, plain_console())


@artifacts.command()
def remove(
    artifact_id: Annotated[str, typer.Argument(help="As `nibble artifacts list` shows it.")],
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Remove an artifact from node caches and the durable copy; not while a replica uses it."""
    from cluster.commands.artifacts import remove_artifact

    remove_artifact(artifact_id, artifacts_config(config), address, plain_console())


keys = typer.Typer(help="The API keys of the file that auth.api_keys_file names.", no_args_is_help=True)
app.add_typer(keys, name="keys")

KeysFile = Annotated[Path, typer.Argument(help="The keys' file.")]
KeyName = Annotated[str, typer.Argument(help="Whose key it is.")]


@keys.command()
def add(
    file: KeysFile,
    name: KeyName,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at once. Default: no limit.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and completions. Default: no limit.")
    ] = None,
) -> None:
    """Make a key and print it, this once; the file, made where there is none, keeps its hash."""
    from cluster.commands.keys import add_key

    print(add_key(file, name, max_concurrent, tokens_per_minute))
    print(f"This is {name}'s key; it is kept nowhere and cannot be shown again.", file=sys.stderr)


@keys.command("list")
def list_keys(file: KeysFile) -> None:
    """The keys' names and limits."""
    from cluster.commands.keys import list_keys

    list_keys(file, plain_console())


@keys.command("remove")
def remove_key(file: KeysFile, name: KeyName) -> None:
    """Remove a key: a running router refuses it a second later."""
    from cluster.commands.keys import remove_key

    remove_key(file, name)


def main() -> None:
    """Exit code 0, 1 for an error of nibble's own (one line on stderr), 2 for wrong arguments, 130 for Ctrl-C."""
    try:
        app()
    except NibbleError as error:
        print(f"nibble: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
