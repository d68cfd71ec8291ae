"""How a knob is declared: once, with its type, default, rule and explanation, in the section of the room that uses it.

A section is a frozen pydantic model. Its fields give the default config that recipes start from, the checks with their
error messages, and docs/settings.md; functions receive the section itself as their settings.
"""

from collections.abc import Collection, Mapping
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
        """JSON and recipes have lists where a frozen section has tuples; the values of a dict stay as they are."""
        return _as_tuple(value)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def knob(default: Any, explanation: str, *, resumable: bool = False, **bounds: float) -> Any:
    """One field of a Section.

    Args:
      explanation: what the value means, with its unit, for a reader who has not seen the code.
      resumable: whether the value may change when a run is resumed, because parameters do not depend on it.
      bounds: ge, gt, le, lt, as pydantic.Field takes them. Choices are the type of the field (a Literal, or `OneOf` a
        table's names), and any other rule is a pydantic.AfterValidator in the type.
    """
    extra: Any = {"resumable": resumable}
    return pydantic.Field(default, description=explanation, json_schema_extra=extra, **bounds)  # type: ignore[arg-type]


def is_resumable(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra["resumable"])


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


def rule_of(field: FieldInfo) -> str:
    """What a value must keep to beside its type, as the end of a sentence; "" where there is no such rule."""
    bounds = {name: value for x in field.metadata for name in ("ge", "gt", "le", "lt") if (value := _bound(x, name))}
    if {"ge", "le"} <= bounds.keys():
        return f"must lie between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    if bounds:
        return "must be " + " and ".join(f"{words[name]} {value}" for name, value in bounds.items())
    choices = [x.names for x in field.metadata if isinstance(x, OneOf)]
    if get_origin(field.annotation) is Literal:
        choices.append(get_args(field.annotation))
    return f"must be one of {_listed(choices[0])}" if choices else ""


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
    first = error.errors()[0]
    field: FieldInfo | None = None
    key, inside = name, section
    for part in first["loc"]:
        if inside is None or part not in inside.model_fields:
            break
        field = inside.model_fields[str(part)]
        key, values = f"{key}.{part}", values[part]
        kind = field.annotation
        inside = kind if isinstance(kind, type) and issubclass(kind, Section) else None
    if field is None:
        return f"{key}: there is no {'.'.join(map(str, first['loc']))!r}"
    if values is None:
        default = field.default
        return f"{key} is None; it must be of type {type(default).__name__}, such as {default!r}"
    said = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    outside = first["type"] in ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "literal_error")
    return f"{key}={values!r}: {rule_of(field) if outside else said}"
