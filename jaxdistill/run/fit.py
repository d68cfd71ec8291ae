"""Whether the models of a run go with its settings and with each other."""

from pathlib import Path
from typing import Any

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS, rouge
from jaxdistill.models.model import Model
from jaxdistill.models.partition import check_heads
from jaxdistill.models.tokenizer import has_tokenizer, load_tokenizer


def check_model(config: Config, model: Model, role: str) -> None:
    """Checks that settings are for this kind of model, and that rows fit it; needs neither tokenizer nor weights.

    Raises:
      UserError: the first setting that does not fit.
    """
    check_heads(model, config.mesh.tensor, role)
    c, kind = config, "causal" if model.family.causal else "masked"
    who = f"the {role} is a {model.config.model_type}, a {kind} language model"
    if c.data.max_length > model.max_length:
        raise UserError(
            f"config.data.max_length={c.data.max_length} is longer than the {role}'s {model.max_length} positions; "
            "lower it"
        )
    if not model.family.causal and c.samples:
        raise UserError(f"{who}, which writes no text; set config.sample and config.loss.alpha_policy to 0")
    if model.family.causal and c.loss.tokens == "masked":
        raise UserError(f"{who}, which masks nothing; set config.loss.tokens to all, or to labels")
    if not model.family.causal and c.data.prompt_column:
        raise UserError(f"{who}, and config.data.prompt_column={c.data.prompt_column!r} is for causal ones")
    for name in c.evaluate.metrics:
        if EVALUATORS[name].kind not in ("", kind):
            raise UserError(f"{who}, and {name} in config.evaluate.metrics is for {EVALUATORS[name].kind} ones")
    if "rouge" in c.evaluate.metrics:
        if not (c.data.prompt_column or c.data.prepared):
            raise UserError("rouge in config.evaluate.metrics scores completions; name config.data.prompt_column")
        rouge.check_installed()


def check_same_kind(teacher: Model | None, model: Model) -> None:
    """Checks that teacher and student are both masked, or both causal.

    Raises:
      UserError: they are not.
    """
    if teacher is not None and teacher.family.causal != model.family.causal:
        kinds = [f"{one.config.model_type} ({'causal' if one.family.causal else 'masked'})" for one in (teacher, model)]
        raise UserError(f"teacher {kinds[0]} and student {kinds[1]}: both must be masked, or both causal")


def tokenizers_of(tokenizer: Any, folder: Path) -> list[Any]:
    """The run's tokenizer and that of a model's folder, for a comparison; none where the folder has none."""
    return [tokenizer, load_tokenizer(folder)] if has_tokenizer(folder) else []
