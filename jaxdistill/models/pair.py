"""Teacher and student of a run, together."""

from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxdistill.models.model import Model

OF_TEACHER = "teacher_"  # begins the names of the figures that the teacher has by itself


class CachedTeacher(NamedTuple):
    """A teacher whose answers are read from a cache; it has a configuration, and no parameters here."""

    model: Model
    words: int  # the answers are over the ids below this


class Pair(NamedTuple):
    """A student, its teacher where there is one, and the tokenizer of both."""

    student: Model
    student_params: PyTree  # arrays, or their shapes
    teacher: Model | None
    teacher_params: PyTree  # arrays or their shapes; {} without a teacher
    tokenizer: Any  # transformers.PreTrainedTokenizerFast; None where nothing reads text
    layers: tuple[int, ...] | None  # the teacher layers that the student was cut from
    cached: CachedTeacher | None = None  # in place of a teacher that runs

    @property
    def imitated(self) -> Model | None:
        """The model that the losses compare with: the teacher that runs, or whose answers are read from a cache."""
        return self.teacher if self.cached is None else self.cached.model
