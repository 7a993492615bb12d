"""What a family's file describes: one record, with everything in which the family differs from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from cluster.families.architecture import Hyperparameters
from cluster.families.config_fields import Config
from cluster.families.names import FamilyName
from cluster.families.tensors import GraphWeights, Layout, TensorRule

# Magic numbers, written as little-endian int32.
UNVERSIONED = b"lmgg"  # 'ggml'
ALIGNED = b"tjgg"  # 'ggjt'

# How the binary spells the tokens: cluster/checkpoints/tokenizer/vocabulary.py has what each form is.
VocabularyForm = Literal["scored_pieces", "spelled_pieces", "decoded_text", "raw_bytes"]


class Container(NamedTuple):
    """The binary's format, as cluster/artifacts/ggml.py writes it, and its tensors that are not only multiplied with.
    Tensor names are the binary's."""

    magic: bytes
    version: int | None
    alignment: int  # of a tensor's data in the file
    embedding: str  # the token embedding
    output: str  # the output matrix
    positions: str | None = None  # the position table, which limits the context
    file_type_base: int = 0  # ggml's later scheme: 1000 times the version of the quantization format


class NativeLibrary(NamedTuple):
    """The family's library in bigdl-llm, which quantizes for all engines and runs engine bigdl."""

    api: Literal["llama.cpp", "forward"]  # deployments/engines/bigdl/library.py has both
    init_backend: bool = False  # it wants to be initialized before it loads a model
    q8_0: bool = True  # it has Q8_0 besides Q4_0


class Transcript(NamedTuple):
    """Chat of models that bring no template: the label before a message of each role, and the `stops` that a model
    writes when it goes on with somebody else's turn."""

    system: str
    user: str
    assistant: str
    stops: tuple[str, ...]


class Family(NamedTuple):
    """`architectures` and `model_types` are what config.json may say, in any case of letters: decapoda-research and
    NVIDIA write LLaMAForCausalLM."""

    name: FamilyName
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]  # the first of each model type, in their order; then other spellings
    default_repo: str  # the Hub repository of the reference example
    alternatives: tuple[str, ...]  # well-known repositories without conditions that both engines run
    demo_prompt: str  # a prompt that the built-in demo checkpoint was trained to answer
    transcript: Transcript
    # config.json and the header's number for the quantization to hyperparameters; what bigdl's library would abort on,
    # or compute wrongly, is noted as an obstacle.
    hyperparameters: Callable[[Config, int], Hyperparameters]
    layout: Layout  # of the checkpoint's tensors
    # The tensors of the binary in file order. Embedding and output matrix are two rules, also of a model that ties
    # them: which stored tensor each is made from, the plan decides.
    tensors: Callable[[Hyperparameters], Iterator[TensorRule]]
    container: Container
    vocabulary: VocabularyForm
    library: NativeLibrary
    # The weights of engine openvino's graph, each with the parts of the binary's tensors that it is.
    graph: Callable[[Hyperparameters], GraphWeights]
