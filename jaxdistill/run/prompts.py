"""Prompts shown to teacher and student at the end of a run, side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jaxdistill.data.prompts import prompt_ids
from jaxdistill.errors import UserError
from jaxdistill.evaluate.fill_mask import encode_prompts, fill_mask
from jaxdistill.evaluate.rouge import greedy
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.sampling.generate import make_generator


def check_prompts(settings: EvaluateConfig, pair: Pair) -> None:
    """Raises UserError for a prompt that cannot be shown to the models."""
    if not pair.student.family.causal:
        encode_prompts(pair.tokenizer, settings.prompts, max_length=pair.student.max_length)
        return
    for prompt, ids in zip(settings.prompts, prompt_ids(pair.tokenizer, settings.prompts), strict=True):
        size, new = len(ids), settings.max_new_tokens
        for role, model in (("student", pair.student), ("teacher", pair.teacher)):
            if model is not None and not 1 <= size <= model.max_length - new:
                raise UserError(
                    f"config.evaluate.prompts: {prompt!r} is {size} tokens long; with "
                    f"config.evaluate.max_new_tokens={new}, 1 to {model.max_length - new} fit the {role}"
                )


def show_prompts(
    settings: EvaluateConfig, pair: Pair, student_params: Callable[[], PyTree], *, report: Callable[[str], None]
) -> None:
    """Prints, for each prompt, how teacher and student fill its mask or continue it.

    Args:
      student_params: gives the student's parameters, on the host; called where there are prompts alone.
    """
    if not settings.prompts:
        return
    sides = [("student", pair.student, student_params())]
    if pair.teacher is not None:
        sides.insert(0, ("teacher", pair.teacher, pair.teacher_params))
    answers = {role: _answers(settings, pair.tokenizer, model, params) for role, model, params in sides}
    for i, prompt in enumerate(settings.prompts):
        report(prompt)
        for role, lines in answers.items():
            report(f"  {role}: {lines[i]}")


def _answers(settings: EvaluateConfig, tokenizer: Any, model: Model, params: PyTree) -> Sequence[str]:
    prompts = list(settings.prompts)
    if model.family.causal:
        generate = make_generator(model, decoding=greedy(settings, model, tokenizer), batch_size=len(prompts))
        completions = generate(params, prompt_ids(tokenizer, prompts), jax.random.key(0))
        texts = tokenizer.batch_decode([list(one.tokens) for one in completions], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
    filled = fill_mask(model, params, tokenizer, prompts)
    return [", ".join(f"{word} {p:.0%}" for word, p in words) for words in filled]
