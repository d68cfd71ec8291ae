"""Models in a Python program: loaded or cut, tried out, and written as folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxdistill.api.arguments import at_least_one, check_flag, name_of, number, texts_of, whole
from jaxdistill.console import say
from jaxdistill.errors import UserError
from jaxdistill.evaluate.fill_mask import make_fill_mask
from jaxdistill.evaluate.neighbours import nearest_words
from jaxdistill.export.folder import FORMATS
from jaxdistill.files import named_path
from jaxdistill.jobs.cut import Cut, write_cut
from jaxdistill.jobs.generate import writer_named
from jaxdistill.models import hub
from jaxdistill.models.layer_choice import resolve_layers
from jaxdistill.models.model import Model, build_model, count_params, param_shapes
from jaxdistill.models.student import cut_student, student_config
from jaxdistill.run.best import step_named
from jaxdistill.run.export import export_run
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.write import Continuation, Writer, continue_prompts

Named = str | PathLike[str]


class Place(NamedTuple):
    """Where a model is read from: a folder, a run folder or the hub."""

    name: str
    revision: str = ""
    step: str = "last"  # of a run


@dataclass(frozen=True)
class LanguageModel:
    """A masked or causal language model with its tokenizer. Its parameters are read when they are first needed."""

    model: Model
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    place: Place  # of a student that was cut: that of its teacher
    layers: tuple[int, ...] | None = None  # of the teacher, where it was cut
    family: str = ""  # of a student that was cut: distilbert, or "" for the teacher's
    allow_pickle: bool = False
    read: Callable[[], PyTree] = field(kw_only=True, repr=False)

    @cached_property
    def params(self) -> PyTree:
        """The parameters, as a tree of arrays."""
        return self.read()

    @property
    def num_params(self) -> int:
        """The number of all parameters, which need not be read for this."""
        return count_params(param_shapes(self.model))

    def __str__(self) -> str:
        kept = f"layers {','.join(map(str, self.layers))} of " if self.layers is not None else ""
        return f"{self.model.config.model_type}, {self.num_params:,} parameters ({kept}{self.place.name})"


def load(name: Named, *, revision: str = "", step: str | int = "last", allow_pickle: bool = False) -> LanguageModel:
    """The model of a folder, of a run or of a name on the Hugging Face hub.

    Args:
      revision: branch, tag or commit of a hub name.
      step: of a run: a step, "best" or "last".
      allow_pickle: whether a pytorch_model.bin may be read, with torch's weights_only.

    Raises:
      UserError: it cannot be read.
    """
    check_flag("allow_pickle", allow_pickle)
    place = Place(name_of("model", name), revision, str(step))
    writer = writer_named(place.name, step=place.step, revision=revision, allow_pickle=allow_pickle, report=say)
    return LanguageModel(writer.model, writer.tokenizer, place, allow_pickle=allow_pickle, read=writer.load)


def loaded(model: LanguageModel | Named) -> LanguageModel:
    """A model that may be given by its name."""
    return model if isinstance(model, LanguageModel) else load(model)


def cut(teacher: LanguageModel | Named, layers: Any = "every_other", *, family: str = "") -> LanguageModel:
    """A student made of some layers of a teacher, without training.

    Args:
      layers: indices, a count that is spread evenly, or "every_other", "first:N", "last:N", "spread:N".
      family: "distilbert" makes a DistilBERT of a BERT; "" keeps the teacher's.

    Raises:
      UserError: there are no such layers, or no such student.
    """
    teacher = loaded(teacher)
    if teacher.layers is not None:
        raise UserError(
            f"the teacher is itself cut from {teacher.place.name}; cut that one, or export the teacher first"
        )
    kept = resolve_layers(layers, of=teacher.model.num_layers, period=teacher.model.period)
    kind = family or teacher.model.config.model_type
    student = build_model(student_config(teacher.model.config, family=kind, layers=kept))

    def read() -> PyTree:
        return cut_student(
            teacher.params,
            teacher=teacher.model,
            student=student,
            layers=kept,
            reference_init=False,
            key=jax.random.key(0),
        )

    return LanguageModel(
        student, teacher.tokenizer, teacher.place, kept, family, allow_pickle=teacher.allow_pickle, read=read
    )


def fill_mask(
    model: LanguageModel | Named, texts: str | Sequence[str], *, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each text, the `top` likeliest words and their probabilities in the place of its first [MASK].

    Raises:
      UserError: the model is no masked one; a text has no [MASK] or is too long.
    """
    asked, count = texts_of("texts", texts), at_least_one("top", top)
    model = loaded(model)
    if model.model.family.causal:
        raise UserError(f"a {model.model.config.model_type} fills no masks; continue a text with generate")
    return make_fill_mask(model.model, model.tokenizer, asked, top=count, where="fill_mask")(model.params)


def generate(
    model: LanguageModel | Named,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Continuation]:
    """Continues each prompt with a causal model; a Continuation is (prompt, completion, tokens, stop).

    Args:
      temperature: 0 takes the likeliest token; above it, tokens are drawn, as top_k and top_p allow.

    Raises:
      UserError: the model is no causal one; a prompt does not fit.
    """
    decoding = Decoding(
        max_new_tokens=whole("max_new_tokens", max_new_tokens),
        temperature=number("temperature", temperature),
        top_k=whole("top_k", top_k),
        top_p=number("top_p", top_p),
    )
    asked, of_batch, drawn = texts_of("prompts", prompts), whole("batch_size", batch_size), whole("seed", seed)
    model = loaded(model)
    writer = Writer(model.model, model.tokenizer, lambda: model.params)
    return continue_prompts(writer, asked, decoding, batch_size=of_batch, seed=drawn)


def neighbours(
    model: LanguageModel | Named, words: str | Sequence[str], *, top: int = 5
) -> dict[str, list[tuple[str, float]]]:
    """For each word the `top` nearest words and their cosines, of the model's input embeddings.

    Raises:
      UserError: the tokenizer does not know a word.
    """
    asked, count = texts_of("words", words), at_least_one("top", top)
    model = loaded(model)
    found = nearest_words(model.model, model.params, model.tokenizer, asked, top=count)
    return dict(zip(asked, found, strict=True))


def export(model: LanguageModel | Named, out: Named, *, to: str = "pytorch") -> Path:
    """Writes the student of a run, or one that was cut, as a Hugging Face folder, and returns its path.

    The folder is read back and compared before it appears.

    Args:
      to: "pytorch" (safetensors) or "flax".

    Raises:
      UserError: the folder exists or cannot be written; the model is a folder already.
    """
    if to not in FORMATS:
        raise UserError(f"to={to!r}: there are {', '.join(FORMATS)}")
    folder = named_path(name_of("out", out))
    model = loaded(model)
    if model.layers is not None:
        kept, place = model.layers, model.place
        made = Cut(place.name, ",".join(map(str, kept)), place.revision, family=model.family)
        write_cut(made, model.model, model.params, model.tokenizer, kept, folder, to=to)
    elif hub.is_run(model.place.name):
        workdir = named_path(model.place.name)
        export_run(workdir, folder, to=to, report=say, step=step_named(workdir, model.place.step))
    else:
        raise UserError(
            f"{model.place.name} is a model folder already; export the student of a run, or one that is cut"
        )
    return folder
