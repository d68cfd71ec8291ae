"""A student made from a teacher: its configuration, and its parameters where layers are copied."""

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxdistill.errors import UserError
from jaxdistill.models.core.attention import FAR
from jaxdistill.models.core.rows import read_settings
from jaxdistill.models.distilbert import distilbert_config, distilbert_params
from jaxdistill.models.layer_choice import half, period_of, resolve_layers
from jaxdistill.models.model import Model, init_params, param_shapes


def student_config(
    teacher_config: Any,
    *,
    family: str,
    layers: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """The student's configuration: the teacher's, or DistilBERT's from a BERT teacher.

    Args:
      layers: the teacher layers that are copied; empty = as many layers as the teacher has.
      overrides: values of further fields, for a randomly initialised student of other sizes.

    Raises:
      UserError: this family cannot be made from the teacher's, or an override names no field, or has another type.
    """
    kind = teacher_config.model_type
    if family == kind:
        config = copy.deepcopy(teacher_config)
    elif (kind, family) == ("bert", "distilbert"):
        config = distilbert_config(teacher_config, cut=bool(layers))
    else:
        raise UserError(
            f"student.family {family!r} from a {kind} teacher: a student is of the teacher's family, or distilbert "
            "from bert; any other pair needs a student folder with its own config.json"
        )
    if layers:
        _set_layers(config, teacher_config, layers)
    config.architectures = None
    config.name_or_path = ""
    _override(config, overrides or {})
    if kind == "gpt_neo":  # the model reads attention_layers, which the config derives from attention_types only once
        config.attention_layers = config.expand_attention_types_params(config.attention_types)
    return config


# Fields of the families of models/core that have an entry for each layer.
_LISTS_BY_LAYER = ("layer_types", "no_rope_layers")


def _set_layers(config: Any, teacher_config: Any, layers: Sequence[int]) -> None:
    """Sets the fields that depend on which layers of the teacher there are."""
    config.num_hidden_layers = len(layers)
    if teacher_config.model_type == "albert":
        config.num_hidden_groups = len(_albert_groups(teacher_config, layers))
    for name in _LISTS_BY_LAYER:
        if getattr(teacher_config, name, None) is not None:
            setattr(config, name, [getattr(teacher_config, name)[i] for i in layers])
    if teacher_config.model_type == "modernbert":
        config.global_attn_every_n_layers = _modernbert_cadence(teacher_config, layers)
    if teacher_config.model_type == "gpt_neo":
        config.attention_types = [[[teacher_config.attention_layers[i] for i in layers], 1]]


def _modernbert_cadence(teacher_config: Any, layers: Sequence[int]) -> int:
    """The n with which every n-th layer of the student is one that sees everything, as those of the teacher are.

    Torch's class of transformers 4 goes by this number alone.
    """
    teacher = read_settings(teacher_config)
    windows = [teacher.layers[i].reach.before < FAR for i in layers]
    fits = [n for n in range(1, len(layers) + 1) if windows == [i % n != 0 for i in range(len(layers))]]
    if layers[0] != 0 or not fits:
        period = teacher_config.global_attn_every_n_layers
        example = resolve_layers(half(of=len(teacher.layers), period=period), of=len(teacher.layers), period=period)
        raise UserError(
            f"layers: {list(layers)}: a ModernBERT begins with layer 0, and every n-th layer from there sees the whole "
            f"text; choose whole periods of {period}, such as {','.join(map(str, example))}"
        )
    return fits[0]


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    fields = sorted({*config.to_dict(), *config.attribute_map})
    before = config.hidden_size, config.num_attention_heads
    for name, value in overrides.items():
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
    for name in _LISTS_BY_LAYER:
        if name not in overrides and getattr(config, name, None) is not None:
            setattr(config, name, _of_length(getattr(config, name), config.num_hidden_layers))
    _fit_heads(config, overrides, *before)


def _of_length(entries: Sequence[Any], layers: int) -> list[Any]:
    """A list by layer for another number of layers, which goes on as its entries repeat."""
    period = period_of(entries)
    return [entries[i] if i < len(entries) else entries[i % period] for i in range(layers)]


# Families whose heads have a size of their own, whatever the width is.
_OWN_HEADS = ("gemma", "gemma2", "gemma3_text", "qwen3")
# The field of the width inside of a layer, where it is not intermediate_size.
INNER_FIELD = {"distilbert": "hidden_dim", "gpt2": "n_inner", "opt": "ffn_dim"}


def _fit_heads(config: Any, overrides: Mapping[str, Any], old_width: int, old_heads: int) -> None:
    """Makes the size of a head follow a new width or number of heads.

    Raises:
      UserError: the heads do not divide a new width; names sizes in the proportions of the old one.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    own_size = config.model_type in _OWN_HEADS or head_dim not in (None, old_width // old_heads)
    # What is no size at all is refused with the rest of the configuration.
    if own_size or (width, heads) == (old_width, old_heads) or min(width, heads) < 1:
        return
    if width == old_width or width % heads == 0:
        if head_dim is not None and "head_dim" not in overrides:
            config.head_dim = width // heads  # the configuration class derives it only once
        return
    most = max(width * old_heads // old_width, 1)  # as many as leave a head no narrower than it was
    fits = {**overrides, "hidden_size": width, "num_attention_heads": _largest_divisor(width, most)}
    if shared := getattr(config, "num_key_value_heads", None):
        fits["num_key_value_heads"] = _largest_divisor(fits["num_attention_heads"], max(shared * most // old_heads, 1))
    inner = INNER_FIELD.get(config.model_type, "intermediate_size")
    if size := getattr(config, inner):  # None in a GPT is four times the width
        fits[inner] = size * width // old_width
    raise UserError(
        f"student.overrides: a width of {width} is not divisible by {heads} heads; in the proportions of "
        f"{old_width} with {old_heads} heads, it is config.student.overrides={fits}"
    )


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if number % n == 0)


def _same_type(old: Any, new: Any) -> bool:
    if isinstance(old, float):
        return type(new) in (int, float)
    return type(new) is type(old) or not isinstance(old, int | str)


def cut_student(
    teacher_params: Mapping[str, Any],
    *,
    teacher: Model,
    student: Model,
    layers: Sequence[int],
    reference_init: bool = False,
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The student's parameters: layer i is teacher layer layers[i], and the rest is copied too, bit for bit.

    Leaves are those of `teacher_params`; tensors that lie in files still lie there (models/stored.py).

    Args:
      reference_init: DistilBERT as the extraction scripts of the reference make it: token types are dropped, where
        otherwise they are added to the position embeddings, and the head's transform is drawn at random.
      key: for the random transform.

    Raises:
      UserError: student and teacher are of families that do not map, or differ in size.
    """
    assert len(layers) == student.num_layers, (layers, student.num_layers)
    kinds = (teacher.config.model_type, student.config.model_type)
    if kinds[0] != kinds[1] and kinds != ("bert", "distilbert"):
        raise UserError(f"a {kinds[1]} student cannot be cut from a {kinds[0]} teacher: give it a folder or random")
    source: dict[str, Any] = dict(flatten_dict(teacher_params, sep="/"))
    source = _pick_layers(source, teacher=teacher, layers=layers)
    if kinds[0] != kinds[1]:
        source = distilbert_params(source, drop_token_types=reference_init)
    if reference_init:
        assert key is not None, "reference_init needs a key"
        drawn = flatten_dict(init_params(student, key), sep="/")
        source |= {path: np.asarray(drawn[path]) for path in drawn if _in_head_transform(path, student)}
    shapes: dict[str, Any] = flatten_dict(param_shapes(student), sep="/")
    for path, shape in shapes.items():
        _check_fits(path, source.get(path), shape.shape)
    return unflatten_dict({path: source[path] for path in shapes}, sep="/")


def _pick_layers(source: Mapping[str, Any], *, teacher: Model, layers: Sequence[int]) -> dict[str, Any]:
    """The parameters, by path, with only the chosen layers, which are numbered anew."""
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


def albert_choices(config: Any, count: int) -> list[tuple[int, ...]]:
    """A choice of `count` layers for each student that can be cut out of an ALBERT: which of its groups are kept.

    Layers of one group have the same parameters, so which of them are chosen makes no difference.
    """
    layers, groups = config.num_hidden_layers, config.num_hidden_groups
    members = [[i for i in range(layers) if _group_of(i, layers, groups) == group] for group in range(groups)]
    found = []
    for kept in range(1, min(count, groups) + 1):
        for chosen in itertools.combinations(members, kept):
            if count % kept == 0 and all(len(group) >= count // kept for group in chosen):
                found.append(tuple(layer for group in chosen for layer in group[: count // kept]))
    return found


def _group_of(layer: int, num_layers: int, num_groups: int) -> int:
    return int(layer / (num_layers / num_groups))


def _albert_groups(config: Any, layers: Sequence[int]) -> tuple[int, ...]:
    """The parameter groups of ALBERT that a student keeps: layer i runs group i // (layers / groups).

    The student's own layers must fall into the groups by the same rule, so each group kept must be chosen
    equally often.
    """
    wanted = [_group_of(layer, config.num_hidden_layers, config.num_hidden_groups) for layer in layers]
    groups = tuple(dict.fromkeys(wanted))
    gets = [groups[_group_of(i, len(layers), len(groups))] for i in range(len(layers))]
    if gets != wanted:
        raise UserError(
            f"layers: {list(layers)} take ALBERT's shared groups {wanted}, but a student of {len(layers)} layers and "
            f"{len(groups)} groups runs {gets}: choose equally many layers of each group"
        )
    return groups


def _in_head_transform(path: str, model: Model) -> bool:
    family = model.family
    return not path.startswith((f"{family.base}/", f"{family.projection}/")) and path != family.projection_bias


def _check_fits(path: str, array: Any, shape: tuple[int, ...]) -> None:
    if array is None or array.shape != shape:
        has = "nothing" if array is None else str(array.shape)
        raise UserError(
            f"cutting the student: {path} is {shape} in the student and {has} in the teacher; a student "
            "that is cut out keeps the teacher's sizes, other sizes start at random (config.student.init=random)"
        )
