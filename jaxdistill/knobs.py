"""How a knob is declared: once, with its type, default, rule and explanation, in the section of the room that uses it.

A section is a frozen pydantic model. Its fields give the default config that recipes start from, the checks with their
error messages, and docs/settings.md; functions receive the section itself as their settings.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import pydantic
import pydantic_core
from pydantic.fields import FieldInfo

from jaxdistill.errors import UserError

S = TypeVar("S", bound="Section")


class Section(pydantic.BaseModel):
    """Settings of one part of the program: immutable, and complete, as every knob has a default."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        """JSON and recipes have lists where a frozen section has tuples; the values of a dict stay as they are.

        Whole numbers must have 64 bits, as arrays, ranges and sizes of files have no more.
        """
        return _as_tuple(value)


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_as_tuple, value))
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be a number of at most 64 bits")
    return value


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that is none of JAX's, where it does not stand in a section."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be a number of at most 64 bits")


# Whether a value may change when a run is resumed: True, as parameters do not depend on it; "content", as it says where
# something lies, and what lies there is compared; "length", where the steps that are trained do not depend on it.
Resumable = bool | Literal["content", "length"]


def knob(default: Any, explanation: str, *, resumable: Resumable = False, **bounds: float) -> Any:
    """One field of a Section.

    Args:
      explanation: what the value means, with its unit, for a reader who has not seen the code.
      resumable: whether the value may change when a run is resumed.
      bounds: ge, gt, le, lt, as pydantic.Field takes them. Choices are the type of the field (a Literal, or `OneOf` a
        table's names), and any other rule is a `Rule` in the type, or a pydantic.AfterValidator where the message of
        a broken rule depends on the value.
    """
    extra: Any = {"resumable": resumable}
    return pydantic.Field(default, description=explanation, json_schema_extra=extra, **bounds)  # type: ignore[arg-type]


def resumable_of(field: FieldInfo) -> Resumable:
    """Whether the value of a field may change when a run is resumed."""
    extra: Any = field.json_schema_extra
    return extra["resumable"] if isinstance(extra, dict) else False


class OneOf:
    """The type annotation of a text that must be a name in a table, or of a tuple of such texts."""

    def __init__(self, names: Collection[str]):
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return pydantic_core.core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: Any) -> Any:
        for name in value if isinstance(value, tuple) else (value,):
            if name not in self.names:
                raise ValueError(f"must be one of {_listed(self.names)}")
        return value


class Rule:
    """The type annotation of a value that must keep to a rule beside its type and bounds.

    Args:
      text: what the value must be, as the end of a sentence: "must be two numbers in [0, 1)".
      holds: whether a value of the right type keeps to the rule.
    """

    def __init__(self, text: str, holds: Callable[[Any], bool]):
        self.text, self.holds = text, holds

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return pydantic_core.core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(self.text)
        return value


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The texts that the value, or each item of a tuple, must be one of; () where any value of the type will do."""
    for constraint in field.metadata:
        if isinstance(constraint, OneOf):
            return tuple(constraint.names)
    kind = field.annotation
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return get_args(item) if get_origin(item) is Literal else ()


def rule_of(field: FieldInfo) -> str:
    """What a value must keep to beside its type, as the end of a sentence; "" where there is no such rule."""
    for constraint in field.metadata:
        if isinstance(constraint, Rule):
            return constraint.text
    if choices := choices_of(field):
        return f"must be {'some' if get_origin(field.annotation) is tuple else 'one'} of {_listed(choices)}"
    return _bounds_of(field) or ("must be texts" if field.annotation == tuple[str, ...] else "")


def _bounds_of(field: FieldInfo) -> str:
    bounds = {name: value for x in field.metadata for name in ("ge", "gt", "le", "lt") if (value := _bound(x, name))}
    if {"ge", "le"} <= bounds.keys():
        return f"must lie between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[name]} {value}" for name, value in bounds.items()]
    return f"must be {' and '.join(parts)}" if parts else ""


def _bound(constraint: Any, name: str) -> str:
    return f"{getattr(constraint, name):.10g}" if hasattr(constraint, name) else ""


def _listed(names: Collection[str]) -> str:
    return ", ".join(name or "''" for name in names)


def checked(section: type[S], values: Mapping[str, Any], *, name: str = "config") -> S:
    """The section with these values, which may be nested.

    Raises:
      UserError: the first value that breaks its rule, as `config.mask.fraction=2: must lie between 0.001 and 1`.
    """
    try:
        return section.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(_explained(error, section, values, name)) from None


def _explained(error: pydantic.ValidationError, section: type[Section], values: Any, name: str) -> str:
    """One line for the first of pydantic's errors: key, value and rule."""
    first = error.errors()[0]
    path = list(first["loc"])
    while path and (field := section.model_fields.get(str(path[0]))):
        values = values[path[0]]
        name = f"{name}.{path.pop(0)}"
        inner = section_of(field)
        if not inner:
            return _broken(field, name, values, first, inside=bool(path))
        section = inner
    keys = ", ".join(section.model_fields)
    return f"{name} has no {path[0]!r}; there are {keys}" if path else f"{name}={values!r}: must have the keys {keys}"


def section_of(field: FieldInfo) -> type[Section] | None:
    """The class of a field that is a section of its own; None for a knob."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


# What pydantic calls the values that have the type of their field and break a rule that `rule_of` states.
_OUT_OF_BOUNDS = (
    "greater_than_equal",
    "greater_than",
    "less_than_equal",
    "less_than",
    "finite_number",
    "literal_error",
)


def _broken(field: FieldInfo, key: str, value: Any, error: Any, *, inside: bool) -> str:
    """One line for a value that a knob cannot have; `inside`: the error is about an item of the value."""
    if value is None:
        default = field.default
        return f"{key} is None; it must be of type {type(default).__name__}, such as {default!r}"
    choices = choices_of(field)
    if choices and isinstance(value, list | tuple):
        strange = next(item for item in value if item not in choices)
        return f"{key} holds {strange!r}; there are {_listed(choices)}"
    if error["type"] == "value_error":  # of a validator
        return f"{key}={value!r}: {error['ctx']['error']}"
    if rule := rule_of(field) if inside or error["type"] in _OUT_OF_BOUNDS else "":
        return f"{key}={value!r}: {rule}"
    kind = field.annotation
    return f"{key}={value!r}: must be of type {kind.__name__ if type(kind) is type else kind}".replace("typing.", "")
