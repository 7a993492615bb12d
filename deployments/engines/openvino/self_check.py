"""Runs an artifact on the openvino engine before it is published: where bigdl's runtime refuses it, or does not run
(`check.py`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from cluster.errors import ArtifactError
from deployments.engines.agreement import CHECKED_TOKENS, relative_rms
from deployments.engines.openvino.derived_weights import derived_weights
from deployments.engines.openvino.paged_model import PagedModel, Work
from deployments.engines.openvino.probe import EXACT

# Nothing is rounded in these settings but the cached keys and values: the rest is the order of additions.
TOLERANCE = 0.02


def check_openvino(folder: Path, threads: int) -> None:
    """Raises ArtifactError where logits do not depend on the tokens, or differ between a prompt computed at once and
    token by token; EngineError where they are not finite, and for what OpenVINO cannot compile."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".check.") as scratch:
        weights, model = derived_weights(folder, Path(scratch))
        paged = PagedModel(weights, model, threads, EXACT)
        paged.allocate(2)
        tokens = [
            (7 * index + 1) % model.vocabulary for index in range(min(CHECKED_TOKENS, model.context or CHECKED_TOKENS))
        ]
        whole = paged.step([Work(tokens, 0, [0], range(len(tokens)))])[0].copy()
        single = np.stack([paged.step([Work([t], i, [1], [0])])[0][0].copy() for i, t in enumerate(tokens)])
    if min(float(row.std()) for row in whole) == 0 or (len(tokens) > 1 and np.allclose(whole[0], whole[-1], rtol=1e-6)):
        raise ArtifactError("the logits do not depend on the token or on the prompt: the artifact is damaged")
    for count, (found, expected) in enumerate(zip(single, whole, strict=True), 1):
        if relative_rms(found, expected) > TOLERANCE:
            raise ArtifactError(f"{count} tokens give other logits one by one than at once: the artifact is damaged")
