"""The numbers that a conversion and an engine need of a model, and what families have in common in reading them.

What neither engine computes as transformers does is refused. What bigdl-llm's runtimes would compute wrongly without a
word, or abort on, is an obstacle to that engine alone: they read the handful of integers in the binary's head and
hard-code everything else. Engine openvino builds its graph from these numbers and has none of these limits.

Of a field with two names, the one that transformers lets win is read first: where a configuration has both, the name of
its `attribute_map` and bloom's n_embed overwrite the other.

Hard-coded by the runtimes: rotary base 10000 without scaling; the tanh form of GELU (SiLU in llama), with which models
made with the erf form agree as well as others; epsilon 1e-5 in layer norms and 1e-6 in llama's. A layer norm with
another epsilon is an obstacle: with small activations logits were off by a quarter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cluster.families.config_fields import NO_ENGINE, Config
from cluster.families.names import ENGINE_NAMES, EngineName
from cluster.families.rotary import Rotary

Activation = Literal["silu", "gelu", "gelu_tanh"]

# By transformers' names (`transformers.activations`): the form with erf, and the same function with tanh in its place.
GELU: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_LAYER_NORM_EPSILON = 1e-5


class Hyperparameters(NamedTuple):
    vocabulary: int
    width: int  # of the residual stream
    feed_forward: int
    heads: int
    key_value_heads: int  # of the checkpoint; the binary has each repeated for the query heads that share it
    layers: int
    tied: bool  # by config.json, the output matrix is the token embedding; what is stored may say otherwise
    header: tuple[int, ...]  # the integers of the binary's head, in the family's order
    epsilon: float  # of the RMS norms (llama) or layer norms
    activation: Activation
    context: int = 0  # gptneox's, and the rows of starcoder's position table
    rotary: Rotary | None = None
    parallel_residual: bool = False  # gptneox: attention and feed-forward have the same input
    attention_bias: bool = False  # llama: q, k and v have biases
    output_bias: bool = False  # llama: and so has what follows the attention
    sliding_window: int | None = None  # a token attends to so many, itself among them; None: to all before it
    obstacles: tuple[tuple[EngineName, str], ...] = ()  # why an engine cannot run it, one reason each

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def engines(self) -> tuple[EngineName, ...]:
        return tuple(name for name in ENGINE_NAMES if name not in dict(self.obstacles))


def read_heads(config: Config, width: int, *names: str) -> int:
    """One head alone is an obstacle: with it, the runtimes' logits have nothing to do with transformers' (gptneox,
    starcoder), are off by some percent (llama), or the process dies of SIGSEGV (bloom); measured with 2.4.0."""
    heads, name = config.integer(*names), config.get(*names)[0]
    if width % heads or (width // heads) % 2:
        raise config.refuse(name, heads, f"a divisor of the width {width} that leaves an even quotient; {NO_ENGINE}")
    if heads == 1:
        config.hinder_bigdl(name, heads, "2 or more: the runtime computes other things with one")
    return heads


def read_feed_forward(config: Config, width: int, name: str) -> int:
    found = config.integer(name, default=4 * width)
    if found != 4 * width:
        config.hinder_bigdl(name, found, f"{4 * width}: the runtime's feed-forward is four times the width")
    return found


def read_layer_norm_epsilon(config: Config, name: str) -> float:
    epsilon = config.positive(name, default=_LAYER_NORM_EPSILON)
    if epsilon != _LAYER_NORM_EPSILON:
        config.hinder_bigdl(name, epsilon, f"{_LAYER_NORM_EPSILON}: the runtime fixes it")
    return epsilon
