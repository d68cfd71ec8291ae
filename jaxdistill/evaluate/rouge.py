"""ROUGE of greedy completions of held-out prompts, as a reader would compare summaries."""

from collections.abc import Iterator, Sequence

import jax
from jaxtyping import PyTree

from jaxdistill.errors import UserError
from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.sampling.generate import make_generator

KINDS = ("rouge1", "rouge2", "rougeL")


def make_rouge(context: Context) -> Evaluator:
    """Yields rouge1, rouge2 and rougeL: mean F-measures, 0 to 1 (Lin 2004; words stemmed, as rouge-score does).

    Then `completion_tokens`, the mean length of a completion with its end, and `completion_ends`, the share that ended
    by themselves. Of context.completions, whose `take` gets prompt, completion and reference of each.

    Raises:
      UserError: rouge-score is not installed; a prompt that does not fit the model.
    """
    asked = context.completions
    assert asked is not None
    check_installed()
    generate = make_generator(context.student, decoding=asked.decoding, batch_size=asked.batch_size)

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        written = generate(student_params, asked.prompt_ids, jax.random.key(0))  # greedy: the key is not looked at
        ids = [list(completion.tokens) for completion in written]
        texts = [text.strip() for text in asked.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        yield from rouge(texts, asked.references)
        yield "completion_tokens", sum(map(len, ids)) / len(ids)
        yield "completion_ends", sum(completion.stop == "end" for completion in written) / len(ids)
        if asked.take is not None:
            records = zip(asked.prompts, texts, asked.references, strict=True)
            asked.take([{"prompt": p, "completion": c, "reference": r} for p, c, r in records])

    return evaluate


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Mean F-measures of the KINDS over pairs of texts."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    for kind in KINDS:
        yield kind, sum(score[kind].fmeasure for score in scores) / len(scores)


def check_installed() -> None:
    """Raises UserError where the rouge-score package is not there."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        raise UserError("evaluate.metrics has rouge, which needs an extra: pip install 'jaxdistill[rouge]'") from error
