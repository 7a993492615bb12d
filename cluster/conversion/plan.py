"""The plan of a conversion: from config.json, the tokenizer and the headers of the weights to every byte's place in the
binary. Pure: it reads no weights and needs no Ray, and every refusal that can be made without weights is made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.artifacts import ggml
from cluster.artifacts.manifest import SHARD_BYTES, Quantization, Record, TensorEntry, TensorType
from cluster.checkpoints.folder import check_companions, check_family, companion_files, read_config
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.checkpoints.tokenizer.vocabulary import read_vocabulary
from cluster.checkpoints.weights import TensorSource, require_convertible, weight_sources
from cluster.conversion.layouts import base_name, output_rows
from cluster.errors import CheckpointError, ConfigError
from cluster.families import FAMILIES, EngineName, FamilyName, family_named
from cluster.families.architecture import Hyperparameters
from cluster.families.config_fields import NO_ENGINE
from cluster.families.family import Container
from cluster.families.tensors import RowOrder, TensorRule

# Part of an artifact's content address: raise it whenever the same checkpoint would give other bytes,
# or other engines would run them.
CONVERTER_VERSION = 2

_FAMILIES_OF: dict[str, tuple[FamilyName, ...]] = {
    "q4_0": tuple(FAMILIES),
    "q8_0": tuple(name for name, family in FAMILIES.items() if family.library.q8_0),
}


class TensorPlan(TensorEntry):
    """A tensor of the binary and how it is made: rows of `source`, taken in the order `rows`, rounded to fp16 first
    where `rounded`. `header` is what precedes its data in the file."""

    header: bytes
    source: TensorSource
    rows: RowOrder
    heads: int
    head_width: int
    rounded: bool

    @property
    def start(self) -> int:
        """Where its record begins in the file."""
        return self.offset - len(self.header)


class ShardPlan(Record):
    """One task's work: the tensors [first, stop), which are the bytes [offset, offset + bytes) of the file. Shard 0
    begins with the head."""

    index: int
    first: int
    stop: int
    offset: int
    bytes: int


class ConversionPlan(Record):
    """Everything a conversion task needs besides the weights themselves. `head` is magic, hyperparameters and
    vocabulary; `bytes` the size of the whole binary; `files` the names of what goes beside it. `engines` can run the
    result, each of the others has an obstacle, the text of an error."""

    family: FamilyName
    quantization: Quantization
    checkpoint: str
    head: bytes
    tensors: tuple[TensorPlan, ...]
    bytes: int
    shards: tuple[ShardPlan, ...]
    files: tuple[str, ...]
    engines: tuple[EngineName, ...]
    obstacles: tuple[tuple[EngineName, str], ...]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensor table of the manifest."""
        return tuple(
            TensorEntry(name=t.name, type=t.type, shape=t.shape, offset=t.offset, bytes=t.bytes) for t in self.tensors
        )


def plan_conversion(
    checkpoint: Path, family: FamilyName, quantization: Quantization = "q4_0", shard_bytes: int = SHARD_BYTES
) -> ConversionPlan:
    """Raises CheckpointError, naming the file or field, for a checkpoint that cannot be converted or that no engine
    would compute rightly; ConfigError for an unknown family or quantization and a shard of less than a byte."""
    family_named(family)
    _check_quantization(family, quantization)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes: found {shard_bytes}, allowed is 1 or more")
    config = read_config(checkpoint)
    check_family(checkpoint, config, family)
    check_companions(checkpoint)
    model = read_hyperparameters(checkpoint, config, family, quantization)
    sources = _named_sources(checkpoint, family, model.tied)
    rules = _checked_rules(checkpoint, family, model, sources)
    container = FAMILIES[family].container
    head = ggml.pack_head(container, model.header, read_vocabulary(checkpoint, family, model.vocabulary))
    tensors = tuple(_place_tensors(container, quantization, rules, sources, model, start=len(head)))
    size = tensors[-1].offset + tensors[-1].bytes
    return ConversionPlan(
        family=family,
        quantization=quantization,
        checkpoint=str(checkpoint),
        head=head,
        tensors=tensors,
        bytes=size,
        shards=tuple(_cut_shards(tensors, size, shard_bytes)),
        files=companion_files(checkpoint),
        engines=model.engines,
        obstacles=model.obstacles,
    )


def _check_quantization(family: FamilyName, quantization: str) -> None:
    families = _FAMILIES_OF.get(quantization)
    if families is None:
        raise ConfigError(f"quantization: found {quantization!r}, allowed are {', '.join(_FAMILIES_OF)}")
    if family not in families:
        allowed = ", ".join(kind for kind in _FAMILIES_OF if family in _FAMILIES_OF[kind])
        raise ConfigError(
            f"quantization: found {quantization}, family {family} allows {allowed}; {quantization} is for"
            f" {', '.join(families)}"
        )


def _named_sources(checkpoint: Path, family: FamilyName, tied: bool) -> dict[str, TensorSource]:
    """The stored tensors by the names that rules have, buffers left out.

    Of a tied model, one matrix stands in for the other where that is not stored; where both are stored, each is used.
    transformers 5 does the same (`PreTrainedModel.tie_weights`): it ties two stored matrices only if they are equal."""
    layout = FAMILIES[family].layout
    sources: dict[str, TensorSource] = {}
    for stored, source in weight_sources(checkpoint).items():
        name = base_name(stored, layout)
        if layout.buffers.fullmatch(name):
            continue
        if name in sources:
            raise CheckpointError(
                f"{checkpoint}: tensors {sources[name].name} and {stored} are both {name} of a {family} model; allowed"
                " is one: save the checkpoint anew without the other"
            )
        sources[name] = source
    if tied:
        for missing, stored in ((layout.output, layout.embedding), (layout.embedding, layout.output)):
            if missing not in sources and stored in sources:
                sources[missing] = sources[stored]
    return sources


def _checked_rules(
    checkpoint: Path, family: FamilyName, model: Hyperparameters, sources: dict[str, TensorSource]
) -> list[TensorRule]:
    """The family's rules, every one of which has the tensor it needs; and no tensor is left that none needs."""
    rules = []
    for rule in FAMILIES[family].tensors(model):
        source = sources.get(rule.source)
        if source is None:
            raise CheckpointError(
                f"{checkpoint}: tensor {rule.source} is missing; {_why(family, model, rule, sources)}"
            )
        require_convertible(source)
        if source.shape != rule.source_shape:
            raise CheckpointError(
                f"{checkpoint / source.file}: tensor {source.name} has shape {list(source.shape)}, allowed is"
                f" {list(rule.source_shape)} by config.json"
            )
        if rule.type == "quantized" and rule.source_shape[1] % ggml.BLOCK_WEIGHTS:
            raise CheckpointError(
                f"{checkpoint / source.file}: tensor {source.name} has rows of {rule.source_shape[1]} weights, allowed"
                f" are multiples of {ggml.BLOCK_WEIGHTS}, the weights in a block; {NO_ENGINE}"
            )
        rules.append(rule)
    _refuse_unused(checkpoint, family, {rule.source for rule in rules}, sources)
    return rules


def _why(family: FamilyName, model: Hyperparameters, rule: TensorRule, sources: dict[str, TensorSource]) -> str:
    """What a missing tensor means, and what to do."""
    stored = next((source.name for source in sources.values() if source.name.endswith(f".{rule.source}")), None)
    if stored is not None:
        return f"found {stored}: save the checkpoint anew with the names of transformers, without that prefix"
    layout = FAMILIES[family].layout
    matrices = {layout.embedding, layout.output}
    if not model.tied and rule.source in matrices and matrices & sources.keys():
        return (
            "with tie_word_embeddings false, or left out where that is the family's default, a checkpoint has both"
            f" {layout.embedding} and {layout.output}: take one of the whole model (ForCausalLM), or set"
            " tie_word_embeddings to true if it was trained so"
        )
    return f"a {family} model of {model.layers} layers has it: download the checkpoint again"


def _refuse_unused(checkpoint: Path, family: FamilyName, used: set[str], sources: dict[str, TensorSource]) -> None:
    """A weight that would be left out (a bias, an adapter, one more layer) means that the model is another than an
    engine would compute."""
    unused = [name for name in sources if name not in used]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise CheckpointError(
            f"{checkpoint}: tensors {', '.join(sorted(unused)[:3])}{more} have no place in a {family} model as"
            f" config.json describes it; {NO_ENGINE}"
        )


def _place_tensors(
    container: Container,
    quantization: Quantization,
    rules: Iterable[TensorRule],
    sources: dict[str, TensorSource],
    model: Hyperparameters,
    start: int,
) -> Iterator[TensorPlan]:
    for rule in rules:
        rows = len(output_rows(rule.rows, model.heads, model.head_width, rule.source_shape[0]))
        shape = (rows, *rule.source_shape[1:])
        kind: TensorType = quantization if rule.type == "quantized" else "f32"
        header = ggml.pack_record_header(container, rule.name, kind, shape, start)
        tensor = TensorPlan(
            name=rule.name,
            type=kind,
            shape=shape,
            offset=start + len(header),
            bytes=ggml.data_bytes(kind, shape),
            header=header,
            source=sources[rule.source],
            rows=rule.rows,
            heads=model.heads,
            head_width=model.head_width,
            rounded=rule.rounded,
        )
        yield tensor
        start = tensor.offset + tensor.bytes


def _cut_shards(tensors: tuple[TensorPlan, ...], size: int, shard_bytes: int) -> Iterator[ShardPlan]:
    """Whole tensors in file order, as many as fit in `shard_bytes`, at least one."""
    index, first, offset = 0, 0, 0
    for stop in range(1, len(tensors) + 1):
        end = size if stop == len(tensors) else tensors[stop].start
        full = stop == len(tensors) or tensors[stop].offset + tensors[stop].bytes - offset > shard_bytes
        if full:
            yield ShardPlan(index=index, first=first, stop=stop, offset=offset, bytes=end - offset)
            index, first, offset = index + 1, stop, end
