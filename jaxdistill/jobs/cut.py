"""Students cut out of a teacher without training, and the search for the layers to keep."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.data.prompts import framed_ids, prompt_ids
from jaxdistill.errors import UserError
from jaxdistill.evaluate import importance, search
from jaxdistill.evaluate.context import Context
from jaxdistill.evaluate.search import Score
from jaxdistill.export.card import Card, model_card
from jaxdistill.export.export import export
from jaxdistill.export.origin import Origin
from jaxdistill.knobs import check_seed
from jaxdistill.models import hub, weights
from jaxdistill.models.axes import TENSOR
from jaxdistill.models.layer_choice import period_choices, resolve_layers
from jaxdistill.models.model import Model, build_model, count_params, param_shapes
from jaxdistill.models.narrow import Scores, Sizes, full_sizes, resolve_sizes
from jaxdistill.models.partition import check_heads
from jaxdistill.models.student import albert_choices, cut_student, student_config
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.importance import narrowed, to_score
from jaxdistill.run.origin import source_named
from jaxdistill.run.training import check_evaluation
from jaxdistill.step import sharding

SEARCH_BATCHES = 8  # of 32 rows: about 5,000 masked tokens at 128 tokens a row
SCORE_BATCHES = 16  # of 32 rows, for channels, units and heads (Minitron takes 512 to 1,024 samples)
SHOWN = 10  # candidates in the table, besides those that have a name

Report = Callable[[str], None]


class Cut(NamedTuple):
    """Which student to cut out of which teacher."""

    teacher: str  # folder or hub name
    # As for layer_choice.resolve_layers; or search, search:N: the N (half of them) that stay closest to the teacher; or
    # empty, which keeps all where other sizes are given.
    layers: str
    revision: str = ""
    text: str = ""  # file whose lines score the candidates of a search, and channels, units and heads
    family: str = ""  # distilbert: a DistilBERT out of a BERT; empty keeps the teacher's
    reference_init: bool = False  # DistilBERT as the reference scripts made it
    seed: int = 0  # of the transform that reference_init draws
    # Sizes of a narrower student; 0 = the teacher's, or as the others ask for.
    width: int = 0
    inner: int = 0
    heads: int = 0

    @property
    def is_narrower(self) -> bool:
        return bool(self.width or self.inner or self.heads)


class Search(NamedTuple):
    """The scores of the candidates of a search, the best one first."""

    text: str
    whole: Score  # of the whole teacher
    scores: list[Score]

    def lines(self) -> Iterator[str]:
        """The table of the best candidates, and of those that have a name."""
        names = search.usual_choices(len(self.scores[0].layers), of=len(self.whole.layers))
        yield f"{'kl':>8} {'loss':>8}  layers ({len(self.scores)} candidates on {self.text})"
        yield f"{0:8.4f} {self.whole.loss:8.4f}  all {len(self.whole.layers)}"
        for place, one in enumerate(self.scores):
            if place < SHOWN or one.layers in names:
                yield f"{one.kl:8.4f} {one.loss:8.4f}  {','.join(map(str, one.layers))} {names.get(one.layers, '')}"


class Made(NamedTuple):
    """A student that was cut out."""

    cut: Cut
    out: Path
    family: str
    layers: tuple[int, ...]
    parameters: int
    of: int  # parameters of the teacher
    searched: Search | None
    sizes: Sizes

    def lines(self) -> Iterator[str]:
        """What it is, for people."""
        yield from self.searched.lines() if self.searched else ()
        width, inner, heads = self.sizes
        sizes = f"width {width}, {inner} inner units, {heads} heads, " if self.cut.is_narrower else ""
        yield (
            f"layers {','.join(map(str, self.layers))} of {self.cut.teacher} are in {self.out}: {self.family}, {sizes}"
            f"{self.parameters:,} of {self.of:,} parameters"
        )

    def values(self) -> dict[str, Any]:
        """What it is, for a script."""
        candidates = [score._asdict() for score in self.searched.scores] if self.searched else []
        return {
            "folder": str(self.out),
            "family": self.family,
            "layers": self.layers,
            "sizes": self.sizes._asdict(),
            "parameters": self.parameters,
            "candidates": candidates,
        }


def init_student(cut: Cut, out: Path, *, allow_pickle: bool, report: Report, mesh: Mesh | None = None) -> Made:
    """Cuts a student out of a teacher and writes it as a PyTorch folder.

    Args:
      mesh: whose devices share the text, and hold the teacher, where the student is chosen; None = all, each of which
        holds the whole teacher.

    Raises:
      UserError: what does not fit.
    """
    check_seed(cut.seed)
    folder = hub.resolve(cut.teacher, revision=cut.revision, allow_pickle=allow_pickle)
    teacher = build_model(hub.load_config(folder))
    searched = cut.layers.partition(":")[0] == "search"
    if not (cut.layers or cut.is_narrower):
        raise UserError("nothing says what to cut: give --layers, or one of --width, --inner and --heads, or both")
    if (searched or cut.is_narrower) != bool(cut.text):
        raise UserError(
            "--layers search, --width, --inner and --heads are chosen by --text FILE, which scores what may be cut; "
            "give one of them and --text, or none and no --text"
        )
    mesh = mesh or sharding.make_mesh(data=-1, fsdp=1)
    check_heads(teacher, mesh.shape[TENSOR], "teacher", prefix="--")
    sizes = resolve_sizes(teacher, width=cut.width, inner=cut.inner, heads=cut.heads)
    if cut.text:
        texts.open_source(Config().data, path=cut.text, split="", key="--text")  # before the teacher is read
    # "search" and "search:N" count as a plain count does.
    spec = f"spread{cut.layers.removeprefix('search')}" if searched else cut.layers or f"first:{teacher.num_layers}"
    layers = resolve_layers(spec, of=teacher.num_layers, period=teacher.period)
    choices = _choices(teacher, cut, count=len(layers)) if searched else None
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, teacher.config)
    teacher_params = weights.open_params(folder, teacher, allow_pickle=allow_pickle)
    found = None
    if searched:
        scoring = _scoring(teacher, teacher_params, tokenizer, cut.text, mesh, report, batches=SEARCH_BATCHES)
        found = Search(cut.text, *search.search_layers(*scoring, count=len(layers), choices=choices))
        layers = found.scores[0].layers
    of = count_params(param_shapes(teacher))
    if cut.is_narrower:
        scores = importance_of(teacher, teacher_params, tokenizer, cut.text, report, mesh=mesh)
        teacher, teacher_params = narrowed(teacher, teacher_params, scores, sizes)
    family = cut.family or teacher.config.model_type
    student_model = build_model(student_config(teacher.config, family=family, layers=layers))
    params = cut_student(
        teacher_params,
        teacher=teacher,
        student=student_model,
        layers=layers,
        reference_init=cut.reference_init,
        key=jax.random.key(cut.seed),
    )
    write_cut(cut, student_model, params, tokenizer, layers, out)
    made = count_params(params)
    return Made(cut, out, student_model.config.model_type, layers, made, of, found, full_sizes(student_model))


def importance_of(
    model: Model, params: PyTree, tokenizer: Any, text: str, report: Report, *, mesh: Mesh | None = None
) -> Scores:
    """The scores of channels, inner units and heads on the first rows of a text; `mesh` as of `init_student`."""
    mesh = mesh or sharding.make_mesh(data=-1, fsdp=1)
    return importance.score(*_scoring(model, params, tokenizer, text, mesh, report, batches=SCORE_BATCHES))


def _choices(teacher: Model, cut: Cut, *, count: int) -> list[tuple[int, ...]] | None:
    """The choices of a search where not every subset of layers makes a student of its own; else None.

    Raises:
      UserError: there is one student alone.
    """
    config = teacher.config
    choices = albert_choices(config, count) if teacher.family.shared_layers else None
    if config.model_type == "modernbert":
        choices = period_choices(count, of=teacher.num_layers, period=teacher.period)
    if count == teacher.num_layers or (choices is not None and len(choices) == 1):
        groups = ""
        if teacher.family.shared_layers:
            groups = f" with the parameters of {config.num_hidden_groups} shared group(s)"
        raise UserError(
            f"--layers {cut.layers}: of {cut.teacher}, {teacher.num_layers} layers{groups}, there is one student of "
            f"{count} layers alone, so there is nothing to choose; give --layers {count}"
        )
    return choices


def write_cut(
    cut: Cut,
    student_model: Model,
    params: PyTree,
    tokenizer: Any,
    layers: tuple[int, ...],
    out: Path,
    *,
    to: str = "pytorch",
) -> None:
    """Writes a student that was cut out as a folder, with a card that says so.

    Args:
      to: one of export.folder.FORMATS.

    Raises:
      UserError: as `export.export.export`.
    """
    sizes = full_sizes(student_model)._asdict() if cut.is_narrower else {}
    recipe = {
        "teacher": {"name": cut.teacher, "revision": cut.revision},
        "student": {"layers": list(layers), "reference_init": cut.reference_init, **sizes},
    }
    origin = Origin(how="cut", teacher=source_named(cut.teacher, cut.revision), is_cut=True, layers=layers, sizes=sizes)
    card = Card(name=out.name, origin=origin, recipe=recipe, causal=student_model.family.causal)
    encode = prompt_ids if student_model.family.causal else framed_ids
    ids = np.array(encode(tokenizer, ["The quick brown fox jumps over the lazy dog."]))
    export(
        model=student_model,
        params=params,
        tokenizer=tokenizer,
        out=out,
        to=to,
        card=model_card(card),
        probe={"input_ids": ids, "attention_mask": np.ones_like(ids, bool)},
    )


def _scoring(
    model: Model, params: PyTree, tokenizer: Any, text: str, mesh: Mesh, report: Report, *, batches: int
) -> tuple[Context, PyTree]:
    """What scores a model on the first rows of a text, and its parameters on the devices."""
    default = Config()
    config = default.changed(
        data={"path": text, "eval_path": text, "max_length": min(default.data.max_length, model.max_length)},
        mask={"smoothing": 0.0},
        evaluate={"batches": batches},
    )
    sources = texts.open_text(config.data)
    prepared = texts.prepare_text(config.data, sources, tokenizer, causal=model.family.causal, report=report)
    check_evaluation(config, mesh)
    return to_score(config, model, params, tokenizer, prepared, held_out_of(config, prepared), mesh)
