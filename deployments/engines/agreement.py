"""How the checks of both engines compare logits."""

from __future__ import annotations

import numpy as np

from deployments.engines.base import Logits

# Few: evaluating is most of the check's time, and grows with the model. Each token goes through every tensor.
CHECKED_TOKENS = 4


def relative_rms(found: Logits, expected: Logits) -> float:
    """RMS of the difference over the RMS of what was expected, both around their means (softmax ignores an offset)."""
    centred = expected - expected.mean()
    return float(np.sqrt(np.mean((found - found.mean() - centred) ** 2) / max(np.mean(centred**2), 1e-30)))
