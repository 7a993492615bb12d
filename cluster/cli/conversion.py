"""`nibble pipeline` and `nibble convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.option_prefixes import PrefixCommand
from cluster.cli.options import Address, DryRun, plain_console
from cluster.errors import ConfigError
from cluster.families import FAMILIES, FAMILY_NAMES, family_named
from cluster.model_config import QUANTIZATIONS

app = typer.Typer()

FAMILY_HELP = f"{', '.join(FAMILY_NAMES[:-1])} or {FAMILY_NAMES[-1]}."
INT8_HELP = f"int4, or int8 (not for {', '.join(row.name for row in FAMILIES.values() if not row.library.q8_0)})."


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
    quantization: Annotated[str, typer.Option(help=INT8_HELP)] = "int4",
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
