"""Students cut out of a teacher without training, and the search for the layers to keep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.data.prompts import framed_ids, prompt_ids
from jaxdistill.errors import UserError
from jaxdistill.evaluate import search
from jaxdistill.evaluate.evaluator import make_context
from jaxdistill.export.card import Card, model_card
from jaxdistill.export.export import export
from jaxdistill.models import hub, weights
from jaxdistill.models.layer_choice import resolve_layers
from jaxdistill.models.model import Model, build_model, count_params, param_shapes
from jaxdistill.models.pair import Pair
from jaxdistill.models.student import cut_student, student_config
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.training import check_evaluation
from jaxdistill.step import sharding

SEARCH_BATCHES = 8  # of 32 rows: about 5,000 masked tokens at 128 tokens a row
SHOWN = 10  # candidates in the table, besides those that have a name

Report = Callable[[str], None]


class Cut(NamedTuple):
    """Which student to cut out of which teacher."""

    teacher: str  # folder or hub name
    # As for layer_choice.resolve_layers; or search, search:N: the N (half of them) that stay closest to the teacher.
    layers: str
    revision: str = ""
    text: str = ""  # file whose lines score the candidates of a search
    family: str = ""  # distilbert: a DistilBERT out of a BERT; empty keeps the teacher's
    reference_init: bool = False  # DistilBERT as the reference scripts made it
    seed: int = 0  # of the transform that reference_init draws


def init_student(cut: Cut, out: Path, *, allow_pickle: bool, report: Report) -> None:
    """Cuts a student out of a teacher and writes it as a PyTorch folder.

    Raises:
      UserError: what does not fit.
    """
    folder = hub.resolve(cut.teacher, revision=cut.revision, allow_pickle=allow_pickle)
    teacher = build_model(hub.load_config(folder))
    searched = cut.layers.partition(":")[0] == "search"
    if searched != bool(cut.text):
        raise UserError(
            "--layers search and --text FILE, to score the candidates on, go together; give both or neither"
        )
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, teacher.config)
    teacher_params = weights.load_params(folder, teacher, allow_pickle=allow_pickle)
    if searched:
        # "search" and "search:N" count as a plain count does.
        count = cut.layers.partition(":")[2] or str(max(teacher.num_layers // 2, 1))
        count = len(resolve_layers(f"spread:{count}", of=teacher.num_layers))
        layers = _search(teacher, teacher_params, tokenizer, text=cut.text, count=count, report=report)
    else:
        layers = resolve_layers(cut.layers, of=teacher.num_layers)
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
    _write(cut, student_model, params, tokenizer, layers, out)
    report(
        f"layers {','.join(map(str, layers))} of {cut.teacher} are in {out}: {student_model.config.model_type}, "
        f"{count_params(params):,} of {count_params(param_shapes(teacher)):,} parameters"
    )


def _write(cut: Cut, student_model: Model, params: PyTree, tokenizer: Any, layers: tuple[int, ...], out: Path) -> None:
    recipe = {
        "teacher": {"name": cut.teacher},
        "student": {"layers": list(layers), "reference_init": cut.reference_init},
    }
    card = Card(
        name=out.name, base_model=cut.teacher, recipe=recipe, license="", results={}, causal=student_model.family.causal
    )
    encode = prompt_ids if student_model.family.causal else framed_ids
    ids = np.array(encode(tokenizer, ["The quick brown fox jumps over the lazy dog."]))
    export(
        model=student_model,
        params=params,
        tokenizer=tokenizer,
        out=out,
        to="pytorch",
        card=model_card(card),
        probe={"input_ids": ids, "attention_mask": np.ones_like(ids, bool)},
    )


def _search(model: Model, params: PyTree, tokenizer: Any, *, text: str, count: int, report: Report) -> tuple[int, ...]:
    """The best `count` layers on the first rows of a text; prints the table they were chosen from."""
    default = Config()
    config = default.changed(
        data={"path": text, "eval_path": text, "max_length": min(default.data.max_length, model.max_length)},
        mask={"smoothing": 0.0},
        evaluate={"batches": SEARCH_BATCHES},
    )
    source = texts.open_text(config.data)
    prepared = texts.prepare_text(config.data, source, tokenizer, causal=model.family.causal, report=report)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    check_evaluation(config, mesh)
    pair = Pair(model, params, None, {}, tokenizer, None)
    context = make_context(config.evaluate, config.mask, pair, prepared, held_out_of(config, prepared), mesh=mesh)
    whole, scores = search.search_layers(context, jax.device_put(params, sharding.replicated(mesh)), count=count)
    names = search.usual_choices(count, of=model.num_layers)
    report(f"{'kl':>8} {'loss':>8}  layers ({len(scores)} candidates on {text})")
    report(f"{0:8.4f} {whole.loss:8.4f}  all {model.num_layers}")
    for place, one in enumerate(scores):
        if place < SHOWN or one.layers in names:
            report(f"{one.kl:8.4f} {one.loss:8.4f}  {','.join(map(str, one.layers))} {names.get(one.layers, '')}")
    return scores[0].layers
