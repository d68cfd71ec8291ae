"""Cut a student out of a teacher: which layers, the student's configuration, its parameters."""

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxdistill.errors import UserError
from jaxdistill.models.model import init_params, param_shapes

if TYPE_CHECKING:
    from jaxdistill.models.model import Model

_SPECS = "a list of indices, a count, 'every_other', 'first:N', 'last:N', 'spread:N' or '0,2,4'"
_ENDS = ("first", "last", "spread")  # with :N, or half of the layers

# Where a BERT module, or the one bias on its own, stands in DistilBERT (Sanh et al. 2019).
_BERT_TO_DISTILBERT = {
    "attention/self/query": "attention/q_lin",
    "attention/self/key": "attention/k_lin",
    "attention/self/value": "attention/v_lin",
    "attention/output/dense": "attention/out_lin",
    "attention/output/LayerNorm": "sa_layer_norm",
    "intermediate/dense": "ffn/lin1",
    "output/dense": "ffn/lin2",
    "output/LayerNorm": "output_layer_norm",
    "cls/predictions/transform/dense": "vocab_transform",
    "cls/predictions/transform/LayerNorm": "vocab_layer_norm",
    "cls/predictions/decoder": "vocab_projector",
    "cls/predictions/bias": "vocab_projector/bias",
}


def resolve_layers(spec: Any, *, of: int) -> tuple[int, ...]:
    """The teacher layers a specification names, ascending, for a teacher of `of` layers.

    A list is taken as it is; a count n (or "spread:n") spreads evenly from the first layer to the last,
    layer i at i * (of - 1) / (n - 1) rounded half up (12 -> 6 gives DistilBERT's 0,2,4,7,9,11; n = 1 gives 0);
    "every_other" is 0,2,4,...; "first:n" and "last:n" are ends; without a number these three take half of the layers;
    "0,2,4" is a list.
    Raises UserError where an index is out of range, repeated or out of order, or where nothing is selected.
    """
    if isinstance(spec, str):
        layers = _parse(spec.strip(), of=of)
    elif isinstance(spec, int) and not isinstance(spec, bool):
        layers = _spread(_count(spec, spec, of=of), of=of)
    elif isinstance(spec, Sequence):
        layers = tuple(spec)
    else:
        raise UserError(f"layers: {spec!r} is not {_SPECS}")
    if not layers:
        raise UserError(f"layers: {spec!r} selects no layer; the teacher has layers 0 to {of - 1}")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise UserError(f"layers: {layer!r} in {spec!r} is not a layer index")
        if not 0 <= layer < of:
            raise UserError(f"layers: {layer} is out of range; the teacher has layers 0 to {of - 1}")
    for before, after in itertools.pairwise(layers):
        if layers.count(after) > 1:
            raise UserError(f"layers: {after} is repeated in {spec!r}; name each layer (0 to {of - 1}) once")
        if after < before:
            raise UserError(f"layers: {after} comes after {before} in {spec!r}; indices must ascend")
    return layers


def student_config(
    teacher_config: Any,
    *,
    family: str,
    layers: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """The student's configuration: the teacher's with `layers` of its layers (empty: all), or DistilBERT from BERT.

    `overrides` sets further fields, for a randomly initialised student of other sizes. Raises UserError for a pair
    of families that does not map, for an unknown field, and for what DistilBERT cannot express.
    """
    kind = teacher_config.model_type
    if family == kind:
        config = copy.deepcopy(teacher_config)
    elif (kind, family) == ("bert", "distilbert"):
        config = _distilbert_config(teacher_config, cut=bool(layers))
    else:
        raise UserError(
            f"student.family {family!r} from a {kind} teacher: a student is of the teacher's family, or distilbert "
            "from bert; any other pair needs a student folder with its own config.json"
        )
    if layers:
        config.num_hidden_layers = len(layers)
        if kind == "albert":
            config.num_hidden_groups = len(_albert_groups(teacher_config, layers))
        if kind == "gpt_neo":
            config.attention_types = [[[teacher_config.attention_layers[i] for i in layers], 1]]
    config.architectures = None
    config.name_or_path = ""
    fields = sorted({*config.to_dict(), *config.attribute_map})
    for name, value in (overrides or {}).items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise UserError(
                f"student.overrides: {config.model_type} has no field {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not _same_type(getattr(config, name), value):
            raise UserError(
                f"student.overrides: {name}={value!r} is a {type(value).__name__}; "
                f"the teacher's is {getattr(config, name)!r}"
            )
        setattr(config, name, value)
    if kind == "gpt_neo":  # which the class reads, and derives only when it is made
        config.attention_layers = config.expand_attention_types_params(config.attention_types)
    return config


def cut_student(
    teacher_params: Mapping[str, Any],
    *,
    teacher: "Model",
    student: "Model",
    layers: Sequence[int],
    reference_init: bool = False,
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The student's parameters (NumPy): layer i is layer layers[i] of the teacher, bit for bit, with all around it.

    BERT to DistilBERT: DistilBERT has no token types, and BERT adds those of type 0 at every position of a single
    text, so that row is folded into the position embeddings. `reference_init` does what the reference's extraction
    scripts do instead: token types are dropped and the head's transform is drawn at random (with `key`).
    Raises UserError where student and teacher do not map or differ in size.
    """
    kinds = (teacher.config.model_type, student.config.model_type)
    assert len(layers) == student.num_layers, (layers, student.num_layers)
    source = {path: np.asarray(array) for path, array in flatten_dict(teacher_params, sep="/").items()}
    if kinds[0] == kinds[1]:
        source = _pick_layers(source, teacher=teacher, layers=layers)
    elif kinds == ("bert", "distilbert"):
        source = _pick_layers(source, teacher=teacher, layers=layers)
        token_types = source.pop("bert/embeddings/token_type_embeddings/embedding")
        if not reference_init:
            positions = "bert/embeddings/position_embeddings/embedding"
            source[positions] = source[positions] + token_types[:1]
        source = {_distilbert_path(path): array for path, array in source.items()}
    else:
        raise UserError(f"a {kinds[1]} student cannot be cut from a {kinds[0]} teacher: give it a folder or random")
    drawn: dict[str, Any] = {}
    if reference_init:
        assert key is not None, "reference_init needs a key"
        drawn = flatten_dict(init_params(student, key), sep="/")
    params = {}
    shapes: dict[str, Any] = flatten_dict(param_shapes(student), sep="/")
    for path, shape in shapes.items():
        random = reference_init and _in_head_transform(path, student)
        array = np.asarray(drawn[path]) if random else source.get(path)
        if array is None or array.shape != shape.shape:
            has = "nothing" if array is None else str(array.shape)
            raise UserError(
                f"cutting the student: {path} is {shape.shape} in the student and {has} in the teacher; a student "
                "that is cut out keeps the teacher's sizes, one of other sizes starts at random"
            )
        params[path] = array
    return unflatten_dict(params, sep="/")


def check_same_vocabulary(teacher_config: Any, student_config: Any, tokenizers: Sequence[Any] = ()) -> None:
    """UserError unless both models, and the tokenizers given (teacher's, student's), have one vocabulary."""
    sizes = teacher_config.vocab_size, student_config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"vocabularies differ: the teacher's has {sizes[0]} entries, the student's {sizes[1]}")
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    for other in vocabularies[1:]:
        first = vocabularies[0]
        if other != first:
            different = len(set(first.items()) ^ set(other.items()))
            raise UserError(
                f"vocabularies differ: the teacher's tokenizer has {len(first)} entries, the student's {len(other)}, "
                f"and {different} (token, id) pairs stand in one only"
            )


def _same_type(old: Any, new: Any) -> bool:
    if isinstance(old, float):
        return type(new) in (int, float)
    return type(new) is type(old) or not isinstance(old, int | str)


def _parse(spec: str, *, of: int) -> tuple[int, ...]:
    if spec == "every_other":
        return tuple(range(0, of, 2))
    name, colon, number = spec.partition(":")
    if name in _ENDS and not colon:
        number = str(max(of // 2, 1))
    try:
        if not number:
            indices = [int(part) for part in spec.split(",") if part.strip()]
            # "6" is a count, as 6 is; "3," is a list of one.
            return tuple(indices) if "," in spec or not indices else _spread(_count(indices[0], spec, of=of), of=of)
        count = _count(int(number), spec, of=of)
    except ValueError:
        raise UserError(f"layers: {spec!r} is not {_SPECS}") from None
    selections = {
        "first": tuple(range(count)),
        "last": tuple(range(of - count, of)),
        "spread": _spread(count, of=of),
    }
    if name not in _ENDS:
        raise UserError(f"layers: {spec!r} is not {_SPECS}")
    return selections[name]


def _count(count: int, spec: Any, *, of: int) -> int:
    if not 1 <= count <= of:
        raise UserError(f"layers: {spec!r} asks for {count} layers; the teacher has {of}, so 1 to {of}")
    return count


def _spread(count: int, *, of: int) -> tuple[int, ...]:
    steps = max(count - 1, 1)
    return tuple((2 * i * (of - 1) + steps) // (2 * steps) for i in range(count))


def _distilbert_config(bert: Any, *, cut: bool) -> Any:
    from transformers import DistilBertConfig

    if cut and bert.layer_norm_eps != 1e-12:
        raise UserError(
            f"DistilBERT's layer norms have eps 1e-12, the teacher's {bert.layer_norm_eps}: cut a bert student instead"
        )
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        sinusoidal_pos_embds=False,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
    )


def _distilbert_path(path: str) -> str:
    layers = "bert/encoder/layer/"
    if path.startswith(layers):
        index, _, inner = path.removeprefix(layers).partition("/")
        module, leaf = inner.rsplit("/", 1)
        return f"distilbert/transformer/layer/{index}/{_BERT_TO_DISTILBERT[module]}/{leaf}"
    if path in _BERT_TO_DISTILBERT:
        return _BERT_TO_DISTILBERT[path]
    module, leaf = path.rsplit("/", 1)
    if module.startswith("bert/embeddings/"):
        return f"distilbert/embeddings/{module.removeprefix('bert/embeddings/')}/{leaf}"
    return f"{_BERT_TO_DISTILBERT[module]}/{leaf}"


def _pick_layers(source: Mapping[str, Any], *, teacher: "Model", layers: Sequence[int]) -> dict[str, Any]:
    """Renumber what stands under the family's layer path; everything else stays."""
    prefix = teacher.family.layers.removesuffix("{}")
    chosen = _albert_groups(teacher.config, layers) if teacher.family.shared_layers else tuple(layers)
    picked = {path: array for path, array in source.items() if not path.startswith(prefix)}
    for new, old in enumerate(chosen):
        inside = f"{prefix}{old}/"
        picked |= {
            f"{prefix}{new}/{path.removeprefix(inside)}": array
            for path, array in source.items()
            if path.startswith(inside)
        }
    return picked


def _albert_groups(config: Any, layers: Sequence[int]) -> tuple[int, ...]:
    """ALBERT shares parameters: layer i runs group i // (layers / groups). The groups that a student keeps.

    The student's own layers must fall into the groups by the same rule, so each group kept must be chosen
    equally often.
    """

    def group_of(layer: int, num_layers: int, num_groups: int) -> int:
        return int(layer / (num_layers / num_groups))

    wanted = [group_of(layer, config.num_hidden_layers, config.num_hidden_groups) for layer in layers]
    groups = tuple(dict.fromkeys(wanted))
    gets = [groups[group_of(i, len(layers), len(groups))] for i in range(len(layers))]
    if gets != wanted:
        raise UserError(
            f"layers: {list(layers)} take ALBERT's shared groups {wanted}, but a student of {len(layers)} layers and "
            f"{len(groups)} groups runs {gets}: choose equally many layers of each group"
        )
    return groups


def _in_head_transform(path: str, model: "Model") -> bool:
    base = model.family.layers.split("/")[0]
    projection = model.family.projection + "/"
    return not path.startswith((base + "/", projection)) and path != model.family.projection_bias
