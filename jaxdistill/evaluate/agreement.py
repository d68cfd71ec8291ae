"""How closely the student follows its teacher on the same fixed masks."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdistill.evaluate.context import Context, Evaluator, labelled_logits, totals
from jaxdistill.losses import forward_kl, masked_sum


def make_agreement(context: Context) -> Evaluator:
    """Yields kl = KL(teacher || student) at T = 1 in nats, top1 = same best word, top5 = the teacher's best word
    among the student's best five; each a mean over the masked positions, or the tokens to be predicted."""
    teacher_model = context.teacher
    assert teacher_model is not None

    @jax.jit
    def sums(student_params: PyTree, teacher_params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        student, _, valid = labelled_logits(context, context.student, student_params, batch)
        teacher, _, _ = labelled_logits(context, teacher_model, teacher_params, batch)
        best = teacher.argmax(axis=-1)
        _, five = jax.lax.top_k(student, 5)
        return {
            "kl": masked_sum(forward_kl(student, teacher, temperature=1.0), valid),
            "top1": masked_sum((five[..., 0] == best).astype("float32"), valid),
            "top5": masked_sum(jnp.any(five == best[..., None], axis=-1).astype("float32"), valid),
            "count": valid.sum(dtype="float32"),
        }

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        whole = totals(context, sums, student_params, teacher_params)
        for name in ("kl", "top1", "top5"):
            yield name, whole[name] / max(whole["count"], 1.0)

    return evaluate
