"""The batches that models write: in place of the text's for on-policy and sequence-level distillation, beside them for
policy gradients.

What is written depends on (seed, step) and the parameters at that step alone, so a resumed run writes it again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxdistill.losses import policy as policies
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.models import intercept
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.sampling.generate import Decoding
from jaxdistill.sampling.rollout import make_sampler, prompts_of
from jaxdistill.sampling.settings import SampleConfig
from jaxdistill.step import sharding
from jaxdistill.step.train_step import micro_batches, undo_micro_batches

Batch = Mapping[str, Any]
# (step from 0, the text's batch on the host, student_params, teacher_params) -> what this update learns from
Rollouts = Callable[[int, Batch, PyTree, PyTree], Batch]


def make_rollouts(
    sample: SampleConfig,
    policy: PolicyConfig | None,
    pair: Pair,
    *,
    max_length: int,
    accumulation: int,
    group: int,
    mesh: Mesh,
    seed: int,
) -> Rollouts:
    """Returns rollouts(step, text, student_params, teacher_params) -> the batch, on the devices.

    With `policy` every update has the text's rows and as many written ones, drawn from the mixture, with what the
    policy gradient needs (`make_scorer`). Without, an update has the text's rows or the written ones: which, and whose,
    is drawn from (seed, step) by the shares.

    Args:
      policy: None where nothing is learnt by a policy gradient or a penalty.
      max_length: tokens of a row, prompt and completion; of longer prompts the end is kept.
      accumulation: pieces that a sample is scored in.
      group: rows that stay together on a device.

    Raises:
      UserError: a masked LM, or prompt and completion do not fit a model's positions.
    """
    end = pair.tokenizer.eos_token_id
    decoding = Decoding(
        sample.max_new_tokens, sample.temperature, sample.top_k, sample.top_p, end_ids=(end,), pad_id=end
    )
    prompt_length = max_length - sample.max_new_tokens
    shares = {"student": (sample.student, 0.0), "teacher": (sample.teacher, 1.0)}
    if policy is not None:
        shares = {"both": (1.0, policy.mixture)}
    write = {
        name: make_sampler(
            student=pair.student,
            teacher=pair.teacher if mixture else None,
            decoding=decoding,
            mixture=mixture,
            length=prompt_length,
        )
        for name, (share, mixture) in shares.items()
        if share
    }
    rows = sharding.by_batch(mesh)
    as_text = {name: jax.jit(lambda batch, name=name: taught(batch, by=name), out_shardings=rows) for name in write}
    beside = jax.jit(lambda text, written: joined(text, written, group=group), out_shardings=rows)
    score = None
    if policy is not None:
        score = make_scorer(pair.student, pair.teacher, policy, accumulation=accumulation, group=group)
    reuse = 1 if policy is None else policy.reuse
    key = jax.random.fold_in(jax.random.key(seed), 2)  # 1 is that of the projections
    held: dict[int, Batch] = {}  # the sample that is in use, by the step it was drawn at

    def written(name: str, step: int, text: Batch, student_params: PyTree, teacher_params: PyTree) -> Batch:
        prompts = prompts_of(text, length=prompt_length, prompt_tokens=sample.prompt_tokens, pad=end)
        prompts = sharding.put_batch(prompts, mesh)
        return write[name](student_params, teacher_params, prompts, jax.random.fold_in(key, step))

    def rollouts(step: int, text: Batch, student_params: PyTree, teacher_params: PyTree) -> Batch:
        if score is not None:
            first = step - step % reuse
            if first not in held:
                assert step == first, "a run resumes between two samples"
                held.clear()
                rows_written = written("both", step, text, student_params, teacher_params)
                held[first] = score(student_params, teacher_params, rows_written)
            return beside(sharding.put_batch(dict(text), mesh), held[first])
        name = whose(step, seed=seed, sample=sample)
        if name == "text":
            return sharding.put_batch(dict(text), mesh)
        return as_text[name](written(name, step, text, student_params, teacher_params))

    return rollouts


def whose(step: int, *, seed: int, sample: SampleConfig) -> str:
    """Who writes what the update learns from: student, teacher or text."""
    drawn = np.random.default_rng((seed, step)).random()
    if drawn < sample.student:
        return "student"
    return "teacher" if drawn < sample.student + sample.teacher else "text"


def taught(written: Batch, *, by: str) -> dict[str, Array]:
    """Written rows as a batch to learn from.

    The divergence is taken on every new token. The teacher's are labels too: the student imitates them. Its own are
    not, as it would only learn to be surer of itself.
    """
    new = written["sampled_mask"]
    batch = {name: written[name] for name in ("input_ids", "attention_mask", "labels")}
    return {**batch, "label_mask": new if by == "teacher" else jnp.zeros_like(new), "head_mask": new}


def make_scorer(
    student: Model, teacher: Model | None, settings: PolicyConfig, *, accumulation: int, group: int
) -> Callable[[PyTree, PyTree, Batch], Batch]:
    """Returns score(student_params, teacher_params, written): the rows with what the policy gradient needs.

    Of every new token: log_p and old_log_q, its log-probability by either model; advantages; weights, for its having
    been drawn from the mixture. Without a teacher, log_p is old_log_q: there are penalties alone, and no reward.
    """

    def log_probs(model: Model, params: PyTree, batch: Batch) -> Array:
        logits = intercept.apply(
            model, params, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        return policies.token_log_probs(logits, jnp.where(batch["sampled_mask"], batch["labels"], 0))

    @jax.jit
    def score(student_params: PyTree, teacher_params: PyTree, written: Batch) -> Batch:
        def both(batch: Batch) -> dict[str, Array]:
            log_q = log_probs(student, student_params, batch)
            return {
                "old_log_q": log_q,
                "log_p": log_q if teacher is None else log_probs(teacher, teacher_params, batch),
            }

        # In the pieces of an update: logits of the whole batch may not fit.
        pieces = jax.lax.map(both, micro_batches(written, accumulation=accumulation, group=group))
        logs = undo_micro_batches(pieces, group=group)
        log_p, log_q = logs["log_p"], logs["old_log_q"]
        return {
            **written,
            **logs,
            "weights": policies.importance_weights(log_p, log_q, alpha=settings.mixture),
            "advantages": policies.advantages(
                policies.rewards(log_p, log_q),
                written["sampled_mask"],
                semantics=settings.semantics,
                length_norm=settings.length_norm,
                gamma=settings.gamma,
                scale=settings.reward_scale,
                reward_clip=settings.reward_clip,
            ),
        }

    return score


def joined(text: Batch, written: Batch, *, group: int) -> dict[str, Array]:
    """Rows of the text and scored rows as one batch, in turn by groups, so that none leaves its device.

    Text has no `sampled_mask`, written rows neither labels, a divergence nor hidden states to follow: what a model
    wrote teaches by the policy gradient alone.
    """
    nothing = jnp.zeros_like(written["sampled_mask"])
    sides = (
        {**text, "head_mask": text["label_mask"], "text_mask": text["attention_mask"]},
        {**written, "label_mask": nothing, "head_mask": nothing, "text_mask": nothing},
    )
    width = max(side["input_ids"].shape[1] for side in sides)

    dtypes = {name: x.dtype for side in sides for name, x in side.items()}

    def of(side: Batch, name: str) -> Array:
        x = side.get(name, jnp.zeros(side["input_ids"].shape, dtypes[name]))
        x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
        return x.reshape(-1, 1, group, width)

    return {
        name: jnp.concatenate([of(side, name) for side in sides], axis=1).reshape(-1, width) for name in sorted(dtypes)
    }
