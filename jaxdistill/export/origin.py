"""What a student was made from, and how: the facts that its model card states."""

from typing import Literal

import pydantic

How = Literal["distilled", "fine-tuned", "cut", "trained"]


class Source(pydantic.BaseModel):
    """A model that another one was made from."""

    model_config = pydantic.ConfigDict(frozen=True)

    name: str  # hub name, model folder or run folder
    licence: dict[str, str] = {}  # license, license_name, license_link, as the hub calls them; {} = not known
    base_models: tuple[str, ...] = ()  # names on the hub: its own, or those that it was made from


class Origin(pydantic.BaseModel):
    """What a student was made from."""

    model_config = pydantic.ConfigDict(frozen=True)

    how: How
    teacher: Source | None = None
    also: tuple[Source, ...] = ()  # the teachers beside the first one
    start: Source | None = None  # the model that the student began as
    is_cut: bool = False  # without a start: whether the student began as layers of the teacher, or else at random
    layers: tuple[int, ...] = ()  # which ones; () where that is not recorded
    sizes: dict[str, int] = {}  # width, inner and heads that were kept by importance; {} = the teacher's

    @property
    def sources(self) -> list[Source]:
        """The models that it was made from, the teachers first."""
        return [source for source in (self.teacher, *self.also, self.start) if source is not None]

    @property
    def base_models(self) -> list[str]:
        """Names on the hub of what it was made from, directly or not."""
        return list(dict.fromkeys(name for source in self.sources for name in source.base_models))

    @property
    def licence(self) -> dict[str, str]:
        """The licence that all of `sources` have; {} where they differ, or where one of them is not known."""
        first, *others = [source.licence for source in self.sources] or [{}]
        return first if all(other == first for other in others) else {}

    def sentence(self) -> str:
        """How it was made, to follow "a language model"."""
        if self.how == "trained":
            return "trained from scratch"
        if self.how == "fine-tuned":
            return f"fine-tuned from {self._begin()}"
        assert self.teacher is not None, "what is cut or distilled has a teacher"
        if self.how == "cut":
            return f"cut from `{self.teacher.name}` ({self._kept()}) and not trained"
        first, *others = [f"`{source.name}`" for source in (self.teacher, *self.also)]
        teachers = f"{', '.join([first, *others[:-1]])} and {others[-1]}" if others else first
        return f"distilled from {teachers}, starting at {self._begin()}"

    def _begin(self) -> str:
        if self.start is not None:
            return f"`{self.start.name}`"
        if self.is_cut and self.teacher is not None:
            return f"{self._kept()} of `{self.teacher.name}`"
        return "random parameters"

    def _kept(self) -> str:
        """What a student that is cut has of its teacher."""
        layers = f"layer{'' if len(self.layers) == 1 else 's'} {', '.join(map(str, self.layers))}".strip()
        if not self.sizes:
            return layers
        width, inner, heads = (self.sizes[name] for name in ("width", "inner", "heads"))
        return f"{layers}, with {width} channels, {inner} inner units and {heads} heads chosen by importance,"
