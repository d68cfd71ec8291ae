"""The cost of deep models by the line through two small depths.

Every layer of a kind costs the same, so an update's cost is affine in the number of its models' layers: it is measured
with few layers of each model, and once more for each model with one period of its layers more. Products, bytes between
devices and the parameters' memory come out exact; temporary memory and bytes moved to within the compiler's own choices
(docs/scaling.md has the figures). A model whose layers are a loop compiles as it is, in the time of a few layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.cost.program import Measured, Memory, Programs, Target, measure
from jaxdistill.cost.roofline import Work
from jaxdistill.losses import terms
from jaxdistill.losses.objective import make_objective
from jaxdistill.models.model import Model, build_model, param_shapes
from jaxdistill.models.student import student_config

WORTH = 0.5  # of all layers, at most so many may be compiled for the line to be worth its while


class Depths(NamedTuple):
    """Layers of a model."""

    small: int
    larger: int
    whole: int

    @property
    def steps(self) -> float:
        """How many times the difference of the two goes into the rest."""
        return (self.whole - self.small) / (self.larger - self.small) if self.larger > self.small else 0.0


class Line(NamedTuple):
    """The depths at which an update is measured."""

    teacher: Depths
    student: Depths


def line_of(target: Target) -> Line | None:
    """The depths for a target; None where it is compiled whole.

    That is where few layers would be saved, where single layers are named, in a loss or as frozen parameters, and where
    there are several teachers.
    """
    config, pair = target.config, target.pair
    if pair.others:
        return None
    objective = make_objective(config.loss, config.policy, pair)
    last = pair.teacher.num_layers if pair.teacher else 0
    hidden, attentions = terms.teacher_layers(objective, last=last)
    if attentions or hidden - {last} or config.train.freeze or config.student.layer_drop:
        return None
    line = Line(_depths(pair.teacher), _depths(pair.student))
    compiled = sum(at.teacher + at.student for at in _points(line))
    return line if compiled <= WORTH * (line.teacher.whole + line.student.whole) else None


def _depths(model: Model | None) -> Depths:
    if model is None:
        return Depths(0, 0, 0)
    whole, period = model.num_layers, model.period
    small = whole % period + period * (2 if period == 1 else 1)
    repeats = model.core is None or all(
        kind == model.core.layers[i % period] for i, kind in enumerate(model.core.layers)
    )
    if model.scan or not repeats or small + period >= whole:
        return Depths(whole, whole, whole)
    return Depths(small, small + period, whole)


class _Point(NamedTuple):
    teacher: int  # layers
    student: int


def _points(line: Line) -> list[_Point]:
    """The point of the small depths, and for each model one with more layers."""
    teacher, student = line
    points = [_Point(teacher.small, student.small)]
    points += [_Point(teacher.larger, student.small)] * (teacher.steps > 0)
    return points + [_Point(teacher.small, student.larger)] * (student.steps > 0)


def measure_by_depth(target: Target, line: Line, *, measure: Callable[[Target], Programs] = measure) -> Programs | None:
    """As `measure`, by the line through few layers; None where the compiler refuses even these."""
    start, *more = [measure(_at(target, point)) for point in _points(line)]
    steps = [depths.steps for depths in line if depths.steps > 0]
    if any(one.work is None for programs in (start, *more) for one in programs.values()):
        return None

    def along(name: str) -> Measured:
        return _along(start[name], [programs[name] for programs in more], steps)

    return {name: along(name) for name in start}


def _at(target: Target, point: _Point) -> Target:
    """The target with fewer layers: the first ones of each model."""
    pair, dtype = target.pair, target.config.teacher.dtype
    student = _first_layers(pair.student, point.student)
    pair = pair._replace(student=student, student_params=param_shapes(student))
    if pair.teacher is not None:
        teacher = _first_layers(pair.teacher, point.teacher)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), param_shapes(teacher))
        pair = pair._replace(teacher=teacher, teacher_params=shapes)
    return target._replace(pair=pair)


def _first_layers(model: Model, layers: int) -> Model:
    if layers == model.num_layers:
        return model
    config = student_config(model.config, family=model.config.model_type, layers=range(layers))
    return build_model(config, dtype=model.dtype, attention=model.attention, classes=model.classes, scan=model.scan)


def _along(start: Measured, more: list[Measured], steps: list[float]) -> Measured:
    def at_end(first: float, larger: list[float]) -> float:
        return first + sum(n * (value - first) for n, value in zip(steps, larger, strict=True))

    def of_memory(field: str) -> int:
        return round(at_end(getattr(start.memory, field), [getattr(one.memory, field) for one in more]))

    def of_work(field: str) -> float:
        return at_end(getattr(start.work, field), [getattr(one.work, field) for one in more])

    kinds = sorted({kind for one in (start, *more) for kind in one.collectives})
    return start._replace(
        memory=Memory(*(of_memory(field) for field in Memory._fields)),
        work=Work(*(of_work(field) for field in Work._fields)),
        collectives={
            kind: round(at_end(start.collectives.get(kind, 0), [one.collectives.get(kind, 0) for one in more]))
            for kind in kinds
        },
    )
