"""How closely the student follows its teacher on held-out text."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxdistill.evaluate.context import Context, Evaluator, measured_tokens, token_sums, totals
from jaxdistill.knobs import Section
from jaxdistill.losses.divergences import forward_kl


def make_agreement(context: Context, settings: Section) -> Evaluator:
    """Yields kl, top1 and top5, means over the masked positions, or over the tokens to be predicted.

    kl = KL(teacher || student) at temperature 1, in nats. top1 is the share of tokens where both models have the same
    most likely word, top5 the share where the teacher's word is among the five most likely words of the student.

    Args:
      settings: not used, as there is no knob of agreement.
    """
    teacher_model = context.teacher
    assert teacher_model is not None

    @jax.jit
    def sums(student_params: PyTree, teacher_params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        student = measured_tokens(context, context.student, student_params, batch)
        teacher = measured_tokens(context, teacher_model, teacher_params, batch)
        return token_sums(context, _compare, student, teacher.head)

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        total = totals(context, sums, student_params, teacher_params)
        for name in ("kl", "top1", "top5"):
            yield name, total[name] / max(total["count"], 1.0)

    return evaluate


def _compare(
    labels: Int[Array, "batch tokens"],
    student: Float[Array, "batch tokens vocab"],
    teacher: Float[Array, "batch tokens vocab"],
) -> dict[str, Float[Array, "batch tokens"]]:
    return agreement_of(student, teacher, ranks=(1, 5))


def agreement_of(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, ranks: Sequence[int]
) -> dict[str, Float[Array, "*tokens"]]:
    """kl as in `make_agreement`, and for every K of `ranks` topK: 1 where the teacher's word is among the student's K
    most likely words, else 0."""
    rank = rank_of(student, teacher.argmax(axis=-1))
    tops = {f"top{k}": (rank < k).astype("float32") for k in ranks}
    return {"kl": forward_kl(student, teacher, temperature=1.0), **tops}


def rank_of(logits: Float[Array, "*tokens vocab"], words: Int[Array, "*tokens"]) -> Int[Array, "*tokens"]:
    """The place of a word in the order of falling logits, 0 for the first; of equal logits, the lower id is first.

    Larger logits are counted, because sorting a vocabulary takes long: 14 s by `lax.top_k` for 1,280 x 50,257 logits
    on two CPU cores, and 0.5 s for this count.
    """
    words = words[..., None]
    own = jnp.take_along_axis(logits, words, axis=-1)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    before = (logits > own) | ((logits == own) & (index < words))
    return before.sum(axis=-1)
