"""Teacher and student of a run, together."""

from typing import Any, Literal, NamedTuple

from jaxtyping import PyTree

from jaxdistill.models.model import Model
from jaxdistill.models.settings import TeacherConfig

OF_TEACHER = "teacher_"  # begins the names of the figures that the teacher has by itself


class Mix(NamedTuple):
    """How the answers of several teachers become one loss."""

    shares: tuple[float, ...]  # of each teacher, the first one first; they add up to 1
    combine: Literal["losses", "probabilities"] = "losses"  # the mean of the losses, or one loss against the mixture


def mix_of(settings: TeacherConfig) -> Mix | None:
    """The mix that the settings ask for; None where there are not several teachers."""
    if settings.count < 2:
        return None
    weights = settings.weights or (1.0,) * settings.count
    return Mix(tuple(weight / sum(weights) for weight in weights), settings.combine)


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
    cached: CachedTeacher | None = None  # in place of a teacher that runs; of several caches, the first
    others: tuple[Model, ...] = ()  # teachers that run beside the first one
    others_params: tuple[PyTree, ...] = ()  # theirs, as `teacher_params`
    mix: Mix | None = None  # of several teachers, or caches

    @property
    def imitated(self) -> Model | None:
        """The model that the losses compare with: the teacher that runs, or whose answers are read from a cache."""
        return self.teacher if self.cached is None else self.cached.model

    @property
    def teachers(self) -> tuple[Model, ...]:
        """All teachers that run."""
        return () if self.teacher is None else (self.teacher, *self.others)

    @property
    def params_of_teachers(self) -> PyTree:
        """The parameters as a train step takes them: those of the teacher, or a tuple of those of several."""
        return (self.teacher_params, *self.others_params) if self.others else self.teacher_params

    def with_params_of_teachers(self, params: PyTree) -> "Pair":
        """The pair with these in place of `params_of_teachers`."""
        first, *others = params if self.others else (params,)
        return self._replace(teacher_params=first, others_params=tuple(others))

    def of_first(self, params: PyTree) -> PyTree:
        """What is of the first teacher in the parameters that a train step takes."""
        return params[0] if self.others else params
