"""Batches of sampled text, which student and teacher write during training.

For on-policy and sequence-level distillation they take the place of batches of the text; for policy gradients they are
put beside these. A sample depends on (seed, step) and the parameters at that step alone, so a resumed run draws the
same sample again.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jaxdistill.data.batching import HostBatch
from jaxdistill.losses import policy as policies
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.models import intercept
from jaxdistill.models.head import first_words
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import Model, common_words
from jaxdistill.models.pair import Pair
from jaxdistill.models.tokenizer import end_ids
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.rollout import Sampler, make_sampler, prompts_of
from jaxdistill.sampling.settings import SampleConfig
from jaxdistill.step import sharding
from jaxdistill.step.batch import Batch, micro_batches, undo_micro_batches

# (step from 0, a batch of the text, student_params, teacher_params) -> the batch that this update learns from
Rollouts = Callable[[int, HostBatch, PyTree, PyTree], Batch]


class BatchLayout(NamedTuple):
    """How long the rows of an update are, and how they are split."""

    max_length: int  # tokens of a row, prompt and completion together; of a longer prompt the end is kept
    accumulation: int  # micro-batches of an update; a sample is scored in as many pieces
    group: int  # rows that stay together on a device
    mesh: Mesh


def make_rollouts(
    sample: SampleConfig, policy: PolicyConfig | None, pair: Pair, layout: BatchLayout, *, seed: int
) -> Rollouts:
    """Returns rollouts(step, text, student_params, teacher_params) -> the batch of an update, on the devices.

    With `policy`, every update has the rows of the text and as many sampled rows, drawn from the mixture, with the
    inputs of the policy gradient (`make_scorer`). Without, an update has the rows of the text or sampled rows:
    `writer_of` draws which, by the shares.

    Args:
      policy: None where no loss is a policy gradient or a penalty on samples.

    Raises:
      UserError: a model is a masked LM, or prompt and completion do not fit its positions.
    """
    if policy is None:
        return _in_place_of_text(sample, pair, layout, seed=seed)
    return _beside_text(sample, policy, pair, layout, seed=seed)


def _in_place_of_text(sample: SampleConfig, pair: Pair, layout: BatchLayout, *, seed: int) -> Rollouts:
    shares_and_mixtures = {"student": (sample.student, 0.0), "teacher": (sample.teacher, 1.0)}
    write = {
        writer: _make_writer(sample, pair, layout, mixture=mixture, seed=seed)
        for writer, (share, mixture) in shares_and_mixtures.items()
        if share
    }
    rows = sharding.by_batch(layout.mesh)
    to_learn = {writer: jax.jit(partial(as_training_batch, by=writer), out_shardings=rows) for writer in write}

    def rollouts(step: int, text: HostBatch, student_params: PyTree, teacher_params: PyTree) -> Batch:
        writer = writer_of(step, seed=seed, sample=sample)
        if writer == "text":
            return sharding.put_batch(dict(text), layout.mesh)
        return to_learn[writer](write[writer](step, text, student_params, teacher_params))

    return rollouts


def _beside_text(sample: SampleConfig, policy: PolicyConfig, pair: Pair, layout: BatchLayout, *, seed: int) -> Rollouts:
    write = _make_writer(sample, pair, layout, mixture=policy.mixture, seed=seed)
    score = make_scorer(pair.student, pair.teacher, policy, accumulation=layout.accumulation, group=layout.group)
    put_beside = jax.jit(partial(interleaved, group=layout.group), out_shardings=sharding.by_batch(layout.mesh))
    scored: dict[int, Batch] = {}  # the sample in use, by the step at which it was drawn

    def rollouts(step: int, text: HostBatch, student_params: PyTree, teacher_params: PyTree) -> Batch:
        first = step - step % policy.reuse
        if first not in scored:
            assert step == first, "a run resumes between two samples"
            scored.clear()  # its memory is free before the next sample is drawn
            sampled = write(step, text, student_params, teacher_params)
            scored[first] = score(student_params, teacher_params, sampled)
        return put_beside(sharding.put_batch(dict(text), layout.mesh), scored[first])

    return rollouts


def _make_writer(sample: SampleConfig, pair: Pair, layout: BatchLayout, *, mixture: float, seed: int) -> Rollouts:
    """Returns write(step, text, student_params, teacher_params): the prompts of the text and sampled completions.

    `mixture` is the teacher's share of the distribution, as in `make_sampler`.
    """
    pad = pair.tokenizer.eos_token_id
    length = layout.max_length - sample.max_new_tokens
    ends = end_ids(pair.student.config, pair.tokenizer)
    draw = sampler_of(sample, pair, layout, mixture=mixture, end_ids=ends, pad=pad)
    key = jax.random.fold_in(jax.random.key(seed), 2)  # 1 is folded in for the projections

    def write(step: int, text: HostBatch, student_params: PyTree, teacher_params: PyTree) -> Batch:
        prompts = prompts_of(text, length=length, prompt_tokens=sample.prompt_tokens, eos=pad)
        on_devices = sharding.put_batch(prompts, layout.mesh)
        return draw(student_params, teacher_params, on_devices, jax.random.fold_in(key, step))

    return write


def sampler_of(
    sample: SampleConfig, pair: Pair, layout: BatchLayout, *, mixture: float, end_ids: tuple[int, ...], pad: int
) -> Sampler:
    """The sampler of `make_sampler` by the settings of a run; `mixture` is the teacher's share of the distribution.

    Args:
      end_ids: tokens that end a text.
      pad: the token after the end.

    Raises:
      UserError: as `make_sampler`.
    """
    return make_sampler(
        student=pair.student,
        teacher=pair.teacher if mixture else None,
        decoding=Decoding(
            sample.max_new_tokens, sample.temperature, sample.top_k, sample.top_p, end_ids=end_ids, pad_id=pad
        ),
        mixture=mixture,
        length=layout.max_length - sample.max_new_tokens,
        words=common_words(pair.student, *pair.teachers),  # the models that do not write read them, too
    )


def writer_of(step: int, *, seed: int, sample: SampleConfig) -> Literal["student", "teacher", "text"]:
    """Who writes the rows of an update, drawn from (seed, step) by the shares; "text": they are rows of the text."""
    drawn = np.random.default_rng((seed, step)).random()
    if drawn < sample.student:
        return "student"
    return "teacher" if drawn < sample.student + sample.teacher else "text"


def as_training_batch(sampled: Batch, *, by: str) -> dict[str, Array]:
    """Sampled rows as a batch to learn from; `by` is student or teacher.

    The divergence is taken on every new token. The tokens of the teacher are labels too, as the student imitates them.
    The student's own tokens are not: as labels, they would only make the student surer of itself. They are in
    `own_mask`, for divergences that depend on who wrote a token.
    """
    new = sampled["sampled_mask"]
    batch = {name: sampled[name] for name in ("input_ids", "attention_mask", "labels")}
    nothing = jnp.zeros_like(new)
    of_teacher, own = (new, nothing) if by == "teacher" else (nothing, new)
    return {**batch, "label_mask": of_teacher, "head_mask": new, "own_mask": own}


def make_scorer(
    student: Model, teacher: Model | None, settings: PolicyConfig, *, accumulation: int, group: int
) -> Callable[[PyTree, PyTree, Batch], Batch]:
    """Returns score(student_params, teacher_params, sampled): the rows with the inputs of the policy gradient.

    These are, for every new token: log_p and old_log_q, its log-probabilities under teacher and student; advantages;
    and weights, which correct for drawing from the mixture. Without a teacher, log_p is old_log_q: there are penalties
    alone, and no reward.
    """
    words = common_words(student, teacher)

    def log_probs_of_both(student_params: PyTree, teacher_params: PyTree, rows: Batch) -> dict[str, Array]:
        log_q = _log_probs(student, student_params, rows, words)
        log_p = log_q if teacher is None else _log_probs(teacher, teacher_params, rows, words)
        return {"old_log_q": log_q, "log_p": log_p}

    @jax.jit
    def score(student_params: PyTree, teacher_params: PyTree, sampled: Batch) -> Batch:
        # In micro-batches, because the logits of the whole batch may not fit.
        pieces = jax.lax.map(
            partial(log_probs_of_both, student_params, teacher_params),
            micro_batches(sampled, accumulation=accumulation, group=group),
        )
        logs = undo_micro_batches(pieces, group=group)
        log_p, log_q = logs["log_p"], logs["old_log_q"]
        return {
            **sampled,
            **logs,
            "weights": policies.importance_weights(log_p, log_q, alpha=settings.mixture),
            "advantages": policies.advantages(policies.rewards(log_p, log_q), sampled["sampled_mask"], settings),
        }

    return score


def _log_probs(model: Model, params: PyTree, rows: Batch, words: int) -> Float[Array, "batch length"]:
    """log-probabilities of the sampled tokens; arbitrary, but finite, at other positions."""
    logits = intercept.apply(model, params, Inputs(rows["input_ids"], rows["attention_mask"])).logits
    logits = first_words(logits, words)
    return policies.token_log_probs(logits, jnp.where(rows["sampled_mask"], rows["labels"], 0))


def interleaved(text: Batch, sampled: Batch, *, group: int) -> dict[str, Array]:
    """Rows of the text and scored sampled rows as one batch, in turn by groups, so that no row leaves its device.

    Rows of the text have no `sampled_mask`. Sampled rows have no labels, no divergence and no hidden states to follow:
    the student learns from a sample by the policy gradient alone.
    """
    nothing = jnp.zeros_like(sampled["sampled_mask"])
    sides = (
        {**text, "head_mask": text["label_mask"], "text_mask": text["attention_mask"]},
        {**sampled, "label_mask": nothing, "head_mask": nothing, "text_mask": nothing},
    )
    width = max(side["input_ids"].shape[1] for side in sides)
    dtypes = {name: x.dtype for side in sides for name, x in side.items()}

    def groups_of(side: Batch, name: str) -> Array:
        x = side.get(name, jnp.zeros(side["input_ids"].shape, dtypes[name]))
        x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
        return x.reshape(-1, 1, group, width)

    return {
        name: jnp.concatenate([groups_of(side, name) for side in sides], axis=1).reshape(-1, width)
        for name in sorted(dtypes)
    }
