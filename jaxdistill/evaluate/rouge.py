"""ROUGE of greedy completions of held-out prompts, as papers on summarisation report it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxdistill.data import causal
from jaxdistill.errors import UserError
from jaxdistill.evaluate.context import Context, Evaluator, ScoredCompletion
from jaxdistill.knobs import Section, knob
from jaxdistill.models.model import Model
from jaxdistill.models.tokenizer import end_ids
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.generate import make_generator

KINDS = ("rouge1", "rouge2", "rougeL")


class RougeConfig(Section):
    """The knobs of rouge, and of prompts that are continued."""

    max_new_tokens: int = knob(
        100, "Largest number of tokens of a continuation, which is chosen greedily.", ge=1, resumable=True
    )
    rouge_rows: int = knob(64, "Held-out prompts whose completions rouge scores; 0 = all.", ge=0, resumable=True)


class HeldOutPairs(NamedTuple):
    """Held-out prompts, as text and as token ids, and the texts that follow them in the data."""

    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    references: Sequence[str]


def make_rouge(context: Context, settings: RougeConfig) -> Evaluator:
    """Yields rouge1, rouge2 and rougeL: mean F-measures, 0 to 1 (Lin 2004; words stemmed, as rouge-score does).

    `completion_tokens` follows, the mean length of a completion with its end token, and `completion_ends`, the share
    of completions that ended by themselves. `context.keep_completions` gets the texts.

    Raises:
      UserError: rouge-score is not installed; there are no held-out prompts, or prompts that do not fit the model.
    """
    pairs = held_out_pairs(context, settings)
    check_installed()
    decoding = greedy(settings, context.student, context.tokenizer)
    generate = make_generator(context.student, decoding=decoding, batch_size=context.batch_size, mesh=context.mesh)

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        # The key is not used, as greedy decoding draws nothing.
        completions = generate(student_params, pairs.prompt_ids, jax.random.key(0))
        ids = [list(completion.tokens) for completion in completions]
        texts = [text.strip() for text in context.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        yield from rouge(texts, pairs.references)
        yield "completion_tokens", sum(map(len, ids)) / len(ids)
        yield "completion_ends", sum(completion.stop == "end" for completion in completions) / len(ids)
        if context.keep_completions is not None:
            context.keep_completions(_records(pairs, texts))

    return evaluate


def held_out_pairs(context: Context, settings: RougeConfig) -> HeldOutPairs:
    """The first `rouge_rows` held-out rows that have a prompt.

    Raises:
      UserError: as `make_rouge`.
    """
    pairs = causal.pairs_of(context.text.held_out, limit=settings.rouge_rows)
    if not pairs:
        raise UserError("rouge in config.evaluate.metrics: no held-out row has a prompt")
    longest, new = max(len(prompt) for prompt, _ in pairs), settings.max_new_tokens
    if longest + new > context.student.max_length:
        raise UserError(
            f"config.evaluate.max_new_tokens={new} and a held-out prompt of {longest} tokens do not fit the student's "
            f"{context.student.max_length} positions; lower it, or config.data.max_length"
        )
    decode = partial(context.tokenizer.batch_decode, skip_special_tokens=True)
    return HeldOutPairs(
        prompts=decode([prompt for prompt, _ in pairs]),
        prompt_ids=[prompt for prompt, _ in pairs],
        references=[reference.strip() for reference in decode([completion for _, completion in pairs])],
    )


def greedy(settings: RougeConfig, model: Model, tokenizer: Any) -> Decoding:
    """How held-out prompts, and those of evaluate.prompts, are continued."""
    ends = end_ids(model.config, tokenizer)
    return Decoding(max_new_tokens=settings.max_new_tokens, end_ids=ends, pad_id=tokenizer.eos_token_id)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Mean F-measures of the KINDS over pairs of texts."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    for kind in KINDS:
        yield kind, sum(score[kind].fmeasure for score in scores) / len(scores)


def _records(pairs: HeldOutPairs, texts: Sequence[str]) -> list[ScoredCompletion]:
    rows = zip(pairs.prompts, texts, pairs.references, strict=True)
    return [{"prompt": prompt, "completion": text, "reference": reference} for prompt, text, reference in rows]


def check_installed() -> None:
    """Raises UserError where the rouge-score package is not installed."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        raise UserError("evaluate.metrics has rouge, which needs an extra: pip install 'jaxdistill[rouge]'") from error
