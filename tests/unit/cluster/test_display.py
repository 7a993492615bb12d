from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster import display
from cluster.display import ConversionDisplay, ConversionProgress, plain_line


def progress(**nodes: int) -> ConversionProgress:
    return ConversionProgress(source="builtin:llama", stage="convert", bytes=200_000_000, nodes=nodes)


def test_a_line_says_how_fast_it_goes_where_and_how_long_it_takes() -> None:
    line = plain_line(progress(b=30_000_000, a=20_000_000), 5)
    assert line == "convert builtin:llama: 50 of 200 MB, 10 MB/s, 15 s left (a 20 MB, b 30 MB)"
    assert plain_line(progress(), 5) == "convert builtin:llama: 0 of 200 MB, 0 MB/s, starting"
    assert "starting" in plain_line(progress(a=1), 0)


def test_without_a_terminal_there_is_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, text = [100.0], io.StringIO()
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with ConversionDisplay(Console(file=text, width=200)) as shown:
        for seconds in (1, 4.9, 5, 9.9, 10):
            now[0] = 100 + seconds
            shown.update([progress(a=50_000_000)])
        now[0] = 200
        shown.update([])
    lines = text.getvalue().splitlines()
    assert [line.split(", ")[1] for line in lines if line] == ["10 MB/s", "5 MB/s"]


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with ConversionDisplay(None) as shown:
        shown.update([progress(a=1)])
        shown.say("a line")
    assert capsys.readouterr() == ("", "")
