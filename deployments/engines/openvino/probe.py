"""Which settings of OpenVINO's CPU plugin are the fastest on this node: tried on a model's first layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from cluster.families.architecture import Hyperparameters
from cluster.machine.isa import cpu_flags
from cluster.model_config import Tune
from cluster.serve_settings import SERVE_LOGGER
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.derived_weights import DerivedWeights
from deployments.engines.openvino.paged_model import PagedModel, PagedSettings, Work

logger = logging.getLogger(SERVE_LOGGER)

PROBED_LAYERS = 2
PROBES = 8
# Times the shortest. The same kernel takes up to half as long again in another process (tests/bench/NOTES.md), so what
# wins by less wins by luck.
NEARLY = 1.5
# Sequences that decode together: what each aim is measured on.
SEQUENCES: dict[Tune, int] = {"latency": 1, "throughput": 8}

EXACT = PagedSettings(precision="f32", quantized_activations=False)


def choose_settings(weights: DerivedWeights, model: Hyperparameters, threads: int, tune: Tune) -> PagedSettings:
    """`precision`: activations are not rounded, and nothing is tried out; nor is it for weights in tiles, whose
    products are nibble's own. The others try each candidate for some tens of steps of the first layers, with weights of
    the model itself, and take the one whose fastest step is shortest; the first that is nearly so, since replicas that
    choose differently give different tokens."""
    if tune == "precision":
        return EXACT
    if weights.in_tiles:
        return PagedSettings()
    tried = {}
    for settings in candidates(cpu_flags()):
        probe = PagedModel(weights, model, threads, settings, layers=min(PROBED_LAYERS, model.layers))
        try:
            probe.allocate(SEQUENCES[tune])
            works = [Work([0], BLOCK_TOKENS // 2, [number], [0]) for number in range(SEQUENCES[tune])]
            tried[settings] = shortest(partial(probe.step, works))
        finally:
            probe.close()  # its packed matrices, of which the output's is large, go before the model packs its own
    chosen = next(settings for settings, seconds in tried.items() if seconds <= NEARLY * min(tried.values()))
    logger.info("openvino: %s: %s", tune, {str(s): f"{1000 * seconds:.2f} ms" for s, seconds in tried.items()})
    return chosen


def candidates(flags: frozenset[str]) -> list[PagedSettings]:
    """bf16 only where the CPU has tiles for it: AVX-512's instruction for it is no faster than f32 with 8-bit
    activations, and without either it is emulated."""
    precisions = ["f32", "bf16"] if "amx_bf16" in flags else ["f32"]
    return [PagedSettings(precision, quantized) for precision in precisions for quantized in (True, False)]


def shortest(step: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: others on the machine only make it slower."""
    step()
    times = []
    for _ in range(PROBES):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)
