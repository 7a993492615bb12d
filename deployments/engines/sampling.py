"""Logits to the next token, by SamplingParams: the same for every engine that hands out logits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from deployments.engines.base import Logits, TokenMask
from deployments.records import SamplingParams

Ids = npt.NDArray[np.int64]

# The most likely tokens that top_p looks at first; it takes eight times as many until they hold enough probability.
_FIRST_CANDIDATES = 256

# Dividing by less would overflow float32, and the most likely token has all the probability anyway.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Draws the tokens of one sequence. `prompt` counts for the repetition penalty and for the positions; `eos_ids` are
    the tokens that `params.min_tokens` keeps away. `generated`: tokens that were drawn before, by another sampler of
    the same sequence; this one goes on as that one would."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Iterable[int],
        eos_ids: Iterable[int] = (),
        mask: TokenMask | None = None,
        generated: Iterable[int] = (),
    ) -> None:
        self._params = params
        self._mask = mask
        prompt = list(prompt)
        self._start = self._position = len(prompt)
        self._seen = set(prompt)
        self._generated: dict[int, int] = {}  # id: how often
        self._eos = np.array(sorted(eos_ids), np.int64)
        self._biased = np.array([token for token, _ in params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        for token in generated:
            self._accept(token)

    def next(self, logits: Logits) -> int:
        """The token at the next position. `logits` [vocab_size] are finite or -inf, and are left as they are."""
        token = draw(self._adjusted(logits), self._params, self._position)
        self._accept(token)
        return token

    def _accept(self, token: int) -> None:
        if self._mask is not None:
            self._mask.accept(token)
        self._position += 1
        self._seen.add(token)
        self._generated[token] = self._generated.get(token, 0) + 1

    def _adjusted(self, logits: Logits) -> Logits:
        """With biases, penalties, the mask and the tokens that are not allowed yet."""
        params = self._params
        repetition = params.repetition_penalty != 1.0 and bool(self._seen)
        counted = (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0) and bool(self._generated)
        too_short = len(self._eos) > 0 and self._position - self._start < params.min_tokens
        if not (repetition or counted or too_short or self._mask is not None or len(self._biased)):
            return logits
        result: Logits = logits.copy()
        if len(self._biased):
            result[self._biased] += self._biases
        if repetition:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            scores = result[ids]
            factor = params.repetition_penalty
            result[ids] = np.where(scores < 0, scores * factor, scores / factor)
        if counted:
            ids = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float64, len(self._generated))
            result[ids] -= counts * params.frequency_penalty + params.presence_penalty
        if self._mask is not None:
            self._mask.apply(result)
        if too_short:
            eos = self._eos[self._eos < len(result)]  # a tokenizer may know more tokens than the model
            kept = result[eos]
            result[eos] = -np.inf
            if not np.isfinite(result.max()):  # the grammar allows nothing but the end
                result[eos] = kept
        return result


def draw(logits: Logits, params: SamplingParams, position: int) -> int:
    """The token at absolute position `position` by temperature, top_k, top_p, min_p (in that order) and seed.

    Greedy takes the lowest id of equal logits. Otherwise the inverse of the cumulative distribution at
    `uniform(seed, position)` over the candidates: by id where nothing is filtered, else by falling logit, then id.
    """
    if params.temperature < _GREEDY_BELOW:
        return int(np.argmax(logits))
    u = uniform(params.seed, position)
    peak = logits.max()
    if 0 < params.top_k < len(logits):
        candidates = _most_likely(logits, params.top_k)
        weights = _weights(logits[candidates], peak, params.temperature)
        total = float(weights.sum())
    elif params.top_p < 1.0:
        everything = _weights(logits, peak, params.temperature)
        total = float(everything.sum(dtype=np.float64))
        candidates = _holding(logits, everything, params.top_p * total)
        weights = everything[candidates]
    else:
        weights = _weights(logits, peak, params.temperature)
        if params.min_p > 0:
            weights[weights < params.min_p] = 0  # the most likely token's weight is 1
        return _inverse_cdf(weights, u)
    if params.top_p < 1.0:
        # The smallest set that holds top_p: a token belongs to it where those before it do not yet.
        before = np.cumsum(weights, dtype=np.float64) - weights
        weights = weights[: max(1, int(np.count_nonzero(before < params.top_p * total)))]
    if params.min_p > 0:
        weights = weights[weights >= params.min_p]  # a beginning of them: they fall
    return int(candidates[_inverse_cdf(weights, u)])


def log_probabilities(logits: Logits, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural log probability of `token` by the model's own `logits` [vocab_size], and the `count` most likely
    tokens with theirs, by falling probability, then id."""
    peak = float(logits.max())
    norm = peak + math.log(float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    top = _most_likely(logits, min(count, len(logits))) if count else ()
    return float(logits[token]) - norm, tuple((int(id), float(logits[id]) - norm) for id in top)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: any replica can go on with a sequence."""
    raw = np.random.Philox(key=seed % 2**128, counter=position).random_raw()
    return float((int(raw) >> 11) * 2.0**-53)


def _weights(logits: Logits, peak: np.float32, temperature: float) -> Logits:
    """Probabilities but for a common factor. float32 throughout: it is several times as fast on a large vocabulary, and
    sums are taken in float64."""
    result: Logits = np.exp((logits - peak) / np.float32(temperature))
    return result


def _inverse_cdf(weights: Logits, u: float) -> int:
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # u < 1, but rounding may reach the end; the last token that has any weight is meant then.
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])


def _most_likely(logits: Logits, count: int) -> Ids:
    """The ids of the `count` largest, by falling logit, then id."""
    threshold = logits[np.argpartition(logits, -count)[-count]]
    ids = np.flatnonzero(logits >= threshold)
    return ids[np.lexsort((ids, -logits[ids]))][:count]


def _holding(logits: Logits, weights: Logits, enough: float) -> Ids:
    """The most likely ids, as many as hold `enough` of the weight or more, in the order of `_most_likely`."""
    count = _FIRST_CANDIDATES
    while count < len(logits):
        ids = _most_likely(logits, count)
        if weights[ids].sum(dtype=np.float64) >= enough:
            return ids
        count *= 8
    return _most_likely(logits, len(logits))
