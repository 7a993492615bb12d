from __future__ import annotations

import numpy as np
import pytest

from cluster.bench.figures import (
    Spread,
    counted_by,
    errors_of,
    figures_of,
    levels_of,
    percentile,
    ratios,
    spread,
    spreads,
)
from cluster.bench.load_records import Failure
from tests.unit.bench_records import CLOSED, OPEN, failed, run_of, sent, settings_for


@pytest.mark.parametrize("percent", [0, 1, 50, 95, 99, 100])
@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [0.5, 0.5, 4.0, 9.0, 11.0]])
def test_percentiles_are_numpy_s(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_a_request_s_times() -> None:
    request = sent(1.5, 2.0, 3.0, due=1.0, end=3.5, tokens=5)
    assert request.first_token_s == 0.5
    assert request.latency_s == 2.5
    assert request.token_s == 0.5  # (3.5 - 1.5) / (5 - 1)
    assert request.gaps_s == [0.5, 1.0]
    assert sent(1.0, tokens=1).token_s is None


def test_tokens_are_the_server_s_count_or_else_the_chunks() -> None:
    assert sent(1.0, 2.0, tokens=5).tokens == 5
    assert sent(1.0, 2.0).tokens == 2
    assert counted_by([run_of(sent(1.0, tokens=5))]) == "usage"
    assert counted_by([run_of(sent(1.0))]) == "chunks"
    assert counted_by([run_of(sent(1.0)), run_of(sent(1.0, tokens=5))]) == "usage and chunks"
    assert counted_by([run_of(failed())]) == "nothing"


def test_figures_of_a_run_count_what_succeeded_alone() -> None:
    figures = figures_of(run_of(sent(1.0, 1.5, tokens=2), sent(0.5, 1.0, 2.0, tokens=4), failed()))
    assert figures["output_tokens_per_s"] == 3.0
    assert figures["requests_per_s"] == 1.0
    assert figures["ttft_p50_s"] == 0.75
    assert figures["ttft_p95_s"] == pytest.approx(0.975)
    assert figures["tpot_p50_s"] == 0.5
    assert figures["gap_p50_s"] == 0.5
    assert figures["gap_p99_s"] == pytest.approx(0.99)
    assert figures["latency_mean_s"] == 1.75
    assert figures["output_tokens"] == 3.0
    assert figures["prompt_tokens"] == 4.0
    assert figures["generator_cpu_s_per_token"] == pytest.approx(0.0005)


def test_where_nothing_succeeded_no_time_is_told() -> None:
    assert figures_of(run_of(failed(), failed())) == {
        "output_tokens_per_s": 0.0,
        "requests_per_s": 0.0,
        "sent_late_p99_s": 0.0,
    }
    assert figures_of(run_of(seconds=0.0)) == {}


def test_errors_are_counted_by_status_and_message() -> None:
    other = Failure("connection", "refused")
    runs = [run_of(failed(), failed(failure=other), sent(1.0)), run_of(failed())]
    assert errors_of(runs) == {"HTTP 429: queue full": 2, "connection: refused": 1}


def test_spreads_are_medians_with_the_least_and_the_greatest() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([None]) is None
    found = spreads([run_of(sent(1.0)), run_of(sent(3.0)), run_of(failed())])
    assert found["ttft_p50_s"] == Spread(2.0, 1.0, 3.0)
    assert found["requests_per_s"] == Spread(0.5, 0.0, 0.5)


def test_ratios_are_of_runs_of_the_same_round() -> None:
    ours = [run_of(sent(1.0), round=0), run_of(sent(9.0), round=1), run_of(sent(5.0), round=2)]
    # In another order, and round 2 was not reached.
    theirs = [run_of(sent(3.0), round=1, server=1), run_of(sent(2.0), round=0, server=1)]
    assert ratios(ours, theirs)["ttft_p50_s"] == Spread(1.75, 0.5, 3.0)
    assert "gap_p50_s" not in ratios(ours, theirs)
    assert ratios(ours, []) == {}


def test_a_ratio_to_nothing_is_left_out() -> None:
    found = ratios([run_of(sent(1.0))], [run_of(failed(), server=1)])
    assert "requests_per_s" not in found
    assert "ttft_p50_s" not in found


def test_levels_have_the_runs_by_load_and_server() -> None:
    settings = settings_for("http://a", "http://b", loads=(CLOSED, OPEN))
    runs = [run_of(sent(1.0), server=1), run_of(sent(1.0), server=0), run_of(sent(2.0), server=1, round=1)]
    (level,) = levels_of(runs, settings)
    assert level.load == CLOSED
    assert level.runs == ((runs[1],), (runs[0], runs[2]))


def test_an_interrupted_run_counts_only_where_there_is_no_other() -> None:
    settings = settings_for("http://a", "http://b")
    whole, cut = run_of(sent(1.0)), run_of(sent(2.0), round=1, ending="interrupted")
    other = run_of(sent(1.0), server=1, ending="interrupted")
    (level,) = levels_of([whole, cut, other], settings)
    assert level.runs == ((whole,), (other,))
