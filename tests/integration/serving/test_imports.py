"""What a process loads that needs one part of nibble alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.families import FamilyName
from tests.conftest import DEMOS


@pytest.mark.parametrize("family", ["bloom", "starcoder"])
def test_loading_a_tokenizer_says_nothing_about_torch(family: FamilyName) -> None:
    """With a chat template and without: then transformers is not imported at all."""
    code = (
        "import sys; from pathlib import Path; from deployments.generation.text import Tokenizer;"
        f" Tokenizer(Path({str(DEMOS / family)!r})); assert ('transformers' in sys.modules) == ({family!r} == 'bloom')"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_importing_the_client_loads_neither_ray_nor_an_engine() -> None:
    code = (
        "import sys; from deployments.client import NibbleClient;"
        "NibbleClient('http://a').close(); NibbleClient('grpc://a:1').close();"
        "print(*sorted({'ray', 'transformers', 'torch', 'fastapi', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_without_traces_nothing_imports_opentelemetry() -> None:
    """Of nibble: Ray's workers do, for their own metrics."""
    code = (
        "import sys, asyncio; from deployments.observability import tracing; from deployments.records import *\n"
        "async def tokens():\n"
        "    yield [1]\n"
        "async def run():\n"
        "    with tracing.traced(GenerationRequest('r', 'a', 1), 'call') as request:\n"
        "        return [batch async for batch in tracing.traced_tokens(tokens(), request.trace, 1)]\n"
        "assert asyncio.run(run()) == [[1]]\n"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
