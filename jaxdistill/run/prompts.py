"""Prompts shown to teacher and student at the end of a run, side by side."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

from jaxdistill.data.prompts import prompt_ids
from jaxdistill.errors import UserError
from jaxdistill.evaluate.fill_mask import encode_prompts, make_fill_mask
from jaxdistill.evaluate.rouge import greedy
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.run.writers import Table
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


def make_samples(settings: EvaluateConfig, pair: Pair) -> Callable[[PyTree], Table]:
    """Returns samples(student's parameters, on the host): how teacher and student answer each of settings.prompts.

    Programs are compiled at the first call, and the teacher is asked once.
    """
    student = _answering(settings, pair.tokenizer, pair.student)
    if pair.teacher is None:
        return lambda params: Table(("prompt", "student"), list(zip(settings.prompts, student(params), strict=True)))
    teacher = _answering(settings, pair.tokenizer, pair.teacher)
    of_teacher = functools.cache(partial(teacher, pair.teacher_params))  # not all of `pair`, which training frees

    def samples(params: PyTree) -> Table:
        rows = list(zip(settings.prompts, of_teacher(), student(params), strict=True))
        return Table(("prompt", "teacher", "student"), rows)

    return samples


def lines_of(samples: Table) -> Iterator[str]:
    """Samples for a terminal: the prompt, and below it what each model answers."""
    for prompt, *answers in samples.rows:
        yield prompt
        yield from (f"  {role}: {answer}" for role, answer in zip(samples.columns[1:], answers, strict=True))


def _answering(settings: EvaluateConfig, tokenizer: Any, model: Model) -> Callable[[PyTree], list[str]]:
    prompts = list(settings.prompts)
    if not prompts:
        return lambda params: []
    if not model.family.causal:
        fill = make_fill_mask(model, tokenizer, prompts)
        return lambda params: [_listed(words) for words in fill(params)]
    generate = make_generator(model, decoding=greedy(settings, model, tokenizer), batch_size=len(prompts))

    def write(params: PyTree) -> list[str]:
        completions = generate(params, prompt_ids(tokenizer, prompts), jax.random.key(0))
        texts = tokenizer.batch_decode([list(one.tokens) for one in completions], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    return write


def _listed(words: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word} {p:.0%}" for word, p in words)
