"""The fields of a config.json, checked before a class of transformers, or a model, is made of them.

The schema of a model type follows from its configuration class: a field has the type of its default, and the sizes are
whole numbers of at least 1. So it serves every family, also one whose class has names of its own for the sizes
(transformers' `attribute_map`). What the values mean for a family is checked where the family is computed.
"""

import functools
import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

import pydantic
import typing_extensions

from jaxdistill.errors import UserError
from jaxdistill.models.families import FAMILIES

# By transformers' common names; names that a class alone has for a size of its own stand among them.
_SIZES = (
    *("vocab_size", "type_vocab_size", "max_position_embeddings", "hidden_size", "embedding_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "window_size"),
    *("num_hidden_groups", "inner_group_num", "word_embed_proj_dim", "ffn_dim", "hidden_dim", "n_inner"),
)
# Fields that may be null although their default is not: torch's model then goes without.
_MAY_BE_NULL = ("sliding_window", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping")
# Fields that may be null where the class derives them from other sizes.
_DERIVED = ("num_key_value_heads", "head_dim")
# The bases of rotary frequencies, as the classes of transformers 4.57 call them.
_OF_4 = ("rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta")
# Fields of the common base class that a model is computed by.
_OF_BASE = ("tie_word_embeddings", "is_decoder", "add_cross_attention", "is_encoder_decoder")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")

_MOST_LAYERS = 2_000  # published models have some 130; every layer takes a second or more to trace and to compile
_MOST_WIDTH = 2**20  # published models have some 20,000
_MOST_BYTES = 2**44  # of parameters in float32, more than four trillion


class _Kind(NamedTuple):
    """What a field may hold, as a type and as the end of a sentence."""

    type: Any
    words: str


def _as_lists(value: Any) -> Any:
    """Tuples, which a recipe may give, as the lists of a file."""
    return [_as_lists(x) for x in value] if isinstance(value, list | tuple) else value


def _repeated_kinds(pair: list[Any]) -> list[Any]:
    kinds, times = pair
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError("the first must be a list of texts")
    if type(times) is not int or not 0 < times * len(kinds) <= _MOST_LAYERS:
        raise ValueError("the second must be a number of layers")
    return pair


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Scaling of rotary positions: numbers, lists of numbers, names, or such an object for each kind of layer."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _rope(value)
            continue
        texts, numbers = name.endswith("type"), value if isinstance(value, list) else [value]
        if value is None or (isinstance(value, str) if texts else numbers and all(_is_number(x) for x in numbers)):
            continue
        raise ValueError(f"{name} has another type")
    return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_SIZE = _Kind(Annotated[int, pydantic.Field(ge=1, lt=2**31)], "a whole number from 1 to 2147483647")
_ID = _Kind(Annotated[int, pydantic.Field(ge=-1, lt=2**31)] | type(None), "the id of a token, or null")
_IDS_OF_ENDS = _Kind(_ID.type | list[Annotated[int, pydantic.Field(ge=0, lt=2**31)]], "the id of a token, or several")
_FLAG = _Kind(bool, "true or false")
# A number of JSON may have thousands of digits; no field needs 15.
_NUMBER = _Kind(Annotated[float, pydantic.Field(gt=-1e15, lt=1e15)], "a finite number")
_POSITIVE = _Kind(Annotated[float, pydantic.Field(gt=0, lt=1e15)], "a number above 0")
_SPREAD = _Kind(Annotated[float, pydantic.Field(ge=0, lt=1e15)], "a number of 0 or more")
_TEXT = _Kind(str, "a text")
_ATTENTION_TYPES = _Kind(  # GPT-Neo's class writes the kinds out as often as the number says
    Annotated[
        list[Annotated[list, pydantic.Field(min_length=2, max_length=2), pydantic.AfterValidator(_repeated_kinds)]],
        pydantic.BeforeValidator(_as_lists),
    ],
    "a list of pairs [[kind, ...], number of times]",
)
_ROPE = _Kind(Annotated[dict, pydantic.AfterValidator(_rope)] | type(None), "an object of numbers and names, or null")
_LIST = _Kind(list | tuple | None, "a list")
_OBJECT = _Kind(dict | None, "an object")
_ANY = _Kind(Any, "any value")
_BY_DEFAULT = {bool: _FLAG, int: _NUMBER, float: _NUMBER, str: _TEXT, list: _LIST, tuple: _LIST, dict: _OBJECT}


def check_fields(where: str, fields: Mapping[str, Any], *, kind: str) -> None:
    """Checks the types of the fields of a configuration, and that a model of its sizes can be made at all.

    Args:
      where: begins the message, such as the path of the file.
      fields: by the names of the class or by the common ones; those that are absent have the default of the class.
      kind: the model type.

    Raises:
      UserError: the first field of another type or range, or sizes that need too many bytes, with the bytes.
    """
    if (defaults := _defaults(kind)) is None:
        return
    schema = _schema(kind)
    try:
        schema.adapter.validate_python(dict(fields))
    except pydantic.ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UserError(f"{where}: {name} is {fields[name]!r}; it must be {schema.words[name]}") from None
    own = {schema.names.get(name, name): value for name, value in fields.items()}
    sizes = {name: value for name, value in defaults.items() if name not in _DERIVED} | own
    _check_sizes(where, {name: sizes.get(schema.names.get(name, name)) for name in _SIZES}, kind=kind)


def head_size(config: Any) -> int:
    """Entries of an attention head: head_dim where the configuration has one, else width / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class _Schema(NamedTuple):
    adapter: pydantic.TypeAdapter[Any]
    words: Mapping[str, str]  # what each field must be
    names: Mapping[str, str]  # common name -> the class's own


@functools.cache
def _defaults(kind: str) -> dict[str, Any] | None:
    """The fields of the class with their defaults; None where transformers has no class for the model type."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if kind not in CONFIG_MAPPING:
        return None
    base = vars(PretrainedConfig())
    defaults = vars(CONFIG_MAPPING[kind]())
    return {name: x for name, x in defaults.items() if name[0] != "_" and (name not in base or name in _OF_BASE)}


@functools.cache
def _schema(kind: str) -> _Schema:
    from transformers import CONFIG_MAPPING

    made: Any = CONFIG_MAPPING[kind]
    names, defaults = made.attribute_map, _defaults(kind) or {}
    derived = [name for name in _DERIVED if name in defaults and _derives(made, name)]
    kinds = {name: _kind_of(name, default, names, derived) for name, default in defaults.items()}
    kinds |= {common: kinds[own] for common, own in names.items() if own in kinds}
    kinds |= {**dict.fromkeys(_IDS, _ID), "eos_token_id": _IDS_OF_ENDS}
    if "rope_parameters" in defaults:  # a class of transformers 5, which reads the fields of 4.57 too
        kinds = {**dict.fromkeys(_OF_4, _POSITIVE), "rope_scaling": _ROPE, **kinds}
    kinds.setdefault("rope_parameters", _ROPE)  # transformers 5 writes it for any class
    if kind in FAMILIES and FAMILIES[kind].positions_after_pad:  # positions count from this id
        kinds["pad_token_id"] = _Kind(Annotated[int, pydantic.Field(ge=0, lt=2**31)], "the id of a token")
    config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    make: Any = typing_extensions.TypedDict  # type checkers want to see the names of the fields
    typed = make("Fields", {name: one.type for name, one in kinds.items()}, total=False)
    typed.__pydantic_config__ = config
    return _Schema(pydantic.TypeAdapter(typed), {name: one.words for name, one in kinds.items()}, names)


def _derives(made: Any, name: str) -> bool:
    """Whether a configuration class works a field out where it is null."""
    try:
        return getattr(made(**{name: None}), name) is not None
    except Exception:  # the classes of transformers 5 refuse null by an error of their own
        return False


def _kind_of(name: str, default: Any, names: Mapping[str, str], derived: Collection[str]) -> _Kind:
    """The kind of a field, by its own name or the common one, and else by its default."""
    common = next((common for common, own in names.items() if own == name), name)
    if common in _SIZES:
        found = _SIZE
    elif name == "attention_types":
        found = _ATTENTION_TYPES
    elif name in ("rope_scaling", "rope_parameters"):
        return _ROPE
    elif name.endswith(("eps", "epsilon", "rope_theta")):
        found = _POSITIVE
    elif name in ("initializer_range", "init_std"):
        found = _SPREAD
    else:
        found = _BY_DEFAULT.get(type(default), _ANY)
    if default is None or name in (*_MAY_BE_NULL, *derived):
        return _Kind(found.type | None if found is not _ANY else Any, f"{found.words}, or null")
    return found


def _check_sizes(where: str, sizes: Mapping[str, int | None], *, kind: str) -> None:
    width = max(sizes["hidden_size"] or 1, (sizes["num_attention_heads"] or 1) * (sizes["head_dim"] or 1))
    shared = (sizes["num_hidden_groups"] or 1) * (sizes["inner_group_num"] or 1)
    layers = max(sizes["num_hidden_layers"] or 1, shared)
    size = 4 * _fewest_parameters(sizes, kind)
    if layers <= _MOST_LAYERS and width <= _MOST_WIDTH and size <= _MOST_BYTES:
        return
    named = ", ".join(f"{name} {value:,}" for name, value in sizes.items() if value and value > _MOST_LAYERS)
    raise UserError(
        f"{where}: a model of {layers:,} layers and the sizes {named} takes {size:,} bytes or more in float32; "
        f"the most here are {_MOST_LAYERS:,} layers, a width of {_MOST_WIDTH:,} and {_MOST_BYTES:,} bytes: correct "
        "config.json"
    )


def _fewest_parameters(sizes: Mapping[str, int | None], kind: str) -> int:
    """A lower bound of the parameters: embeddings, two matrices of attention and two of the inner layer."""
    family = FAMILIES.get(kind)

    def size(*names: str, default: int) -> int:
        return next((value for name in names if (value := sizes[name])), default)

    width = size("hidden_size", default=1)
    heads = size("num_attention_heads", default=1)
    head = size("head_dim", default=math.ceil(width / heads))
    inner = size("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * width)
    distinct = size("num_hidden_layers", default=1)
    if family is not None and family.shared_layers:
        distinct = size("num_hidden_groups", default=1) * size("inner_group_num", default=1)
    rows = size("vocab_size", default=1) + size("type_vocab_size", default=0)
    if family is not None and not family.rotary:
        rows += size("max_position_embeddings", default=0)
    return rows * size("embedding_size", "word_embed_proj_dim", default=width) + distinct * 2 * width * (
        inner + heads * head
    )
