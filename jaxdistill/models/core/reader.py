"""A configuration read field by field: a field that nobody asked for, and that says something, is refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxdistill.errors import UserError

_NEEDED: Any = object()

# Fields of any configuration that say nothing about what a model computes.
SAYS_NOTHING = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
        *("use_cache", "cache_implementation", "attn_implementation", "unsloth_fixed", "unsloth_version"),
        *("is_llama_config", "rope_interleaved", "pretraining_tp", "transformers.js_config"),
        *("gradient_checkpointing", "torch_dtype", "dtype", "model_type", "max_length", "auto_map"),
    }
)
# Fields of transformers' common base class that would change the computation.
_BASE_THAT_COUNTS = frozenset(
    {"tie_word_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads", "pad_token_id"}
)


class Reader:
    """Reads the fields of a configuration by name and type, and remembers which were asked for."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where = where  # begins every refusal
        self.asked: set[str] = set()
        self._fields = fields

    def value(self, name: str, default: Any = None) -> Any:
        """The field as it stands; `default` where it is absent or null."""
        self.asked.add(name)
        value = self._fields.get(name)
        value = default if value is None else value
        if value is _NEEDED:
            raise self.refusal(f"{name} is missing")
        return value

    def integer(self, name: str, default: Any = _NEEDED, *, least: int = 1) -> int:
        value = self.value(name, default)
        if type(value) is not int or value < least:
            raise self.refusal(f"{name} is {value!r}; it must be a whole number, at least {least}")
        return value

    def number(self, name: str, default: Any = _NEEDED, *, positive: bool = True) -> float:
        value = self.value(name, default)
        if type(value) not in (int, float) or not (value > 0 if positive else value >= 0) or value == float("inf"):
            raise self.refusal(f"{name} is {value!r}; it must be a number {'above' if positive else 'from'} 0")
        return float(value)

    def dropout(self, name: str) -> float:
        value = self.value(name, 0.0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self.refusal(f"{name} is {value!r}; a dropout must lie between 0 and 1")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.value(name, default)
        if type(value) is not bool:
            raise self.refusal(f"{name} is {value!r}; it must be true or false")
        return value

    def word(self, name: str, of: Collection[str], default: Any = _NEEDED) -> str:
        value = self.value(name, default)
        if not isinstance(value, str) or value not in of:
            raise self.refusal(f"{name} is {value!r}; known here are {', '.join(of)}")
        return value

    def pass_over(self, *names: str) -> None:
        """Names fields that the torch class has and does not compute with."""
        self.asked.update(names)

    def finish(self) -> None:
        """Refuses what is left.

        Raises:
          UserError: a field that was not asked for is neither empty nor known to say nothing.
        """
        for name, value in sorted(self._fields.items()):
            empty = value is None or value is False or (isinstance(value, Collection) and not value)
            if not (empty or name in self.asked or name in SAYS_NOTHING):
                raise self.refusal(f"{name} is {value!r}, which is not known here")

    def refusal(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}")


def reader_of(config: Any) -> Reader:
    """A reader of a configuration of transformers, without the fields of its base class that do not count."""
    from transformers import PretrainedConfig

    base = set(PretrainedConfig().to_dict()) - _BASE_THAT_COUNTS
    fields = {name: value for name, value in config.to_dict().items() if name not in base or name.startswith("rope")}
    return Reader(f"{config.model_type} config", fields)
