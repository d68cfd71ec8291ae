"""What a report compares models by: all figures of the head's logits in one pass, hidden states, and speed."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int64, PyTree

from jaxdistill.evaluate.agreement import agreement_of
from jaxdistill.evaluate.context import Context, MeasuredTokens, measured_tokens, token_sums, totals
from jaxdistill.losses.divergences import cross_entropy
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.model import Model
from jaxdistill.step import sharding

RANKS = (1, 2, 5, 10)
BANDS = {"frequent": 0.5, "common": 0.9, "rare": 1.0}  # name -> share of the text's tokens that its words end at
BINS = 10  # of equal width in the confidence, as Guo et al. 2017 (arXiv:1706.04599)
SIMILARITY_TOKENS = 1024


class Measured(NamedTuple):
    """The figures of one model on held-out text."""

    figures: dict[str, float]
    calibration: list[
        tuple[float, float, float]
    ]  # (mean confidence, accuracy, share of tokens) of each bin with tokens


def make_comparison(context: Context) -> Callable[[PyTree, PyTree], Measured]:
    """Returns measure(student_params, teacher_params): the student's figures, and those beside the teacher if any.

    perplexity, accuracy; ece, the mean gap between confidence and accuracy over BINS of the confidence; kl and topK as
    in `make_agreement`, for the K of RANKS; the perplexity of each of the BANDS of words.
    """
    teacher_model = context.teacher
    bands = jnp.asarray(band_of_words(context.text.token_counts, special=context.text.vocabulary.special))

    def alone(labels: Array, student: Array) -> dict[str, Array]:
        return _alone(labels, student, bands)

    @jax.jit
    def sums(student_params: PyTree, teacher_params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        student = measured_tokens(context, context.student, student_params, batch)
        found = token_sums(context, alone, student)
        if teacher_model is not None:
            teacher: MeasuredTokens = measured_tokens(context, teacher_model, teacher_params, batch)
            found |= token_sums(context, _beside, student, teacher.head)
        return found

    def measure(student_params: PyTree, teacher_params: PyTree) -> Measured:
        return _figures(totals(context, sums, student_params, teacher_params))

    return measure


def band_of_words(counts: Int64[np.ndarray, "vocab"], *, special: tuple[int, ...]) -> Int64[np.ndarray, "vocab"]:
    """The number of each word's band: words in the order of how often they stand in the text, cut at shares of it."""
    counts = counts.copy()
    counts[[id for id in special if id < len(counts)]] = 0
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # tokens of the words that are more frequent
    bands = np.empty(len(counts), np.int64)
    bands[order] = np.searchsorted([*BANDS.values()][:-1], before / max(counts.sum(), 1), side="right")
    return bands


def _alone(
    labels: Int[Array, "batch tokens"], student: Float[Array, "batch tokens vocab"], bands: Int[Array, "vocab"]
) -> dict[str, Float[Array, "batch tokens"]]:
    nll = cross_entropy(student, labels)
    right = (student.argmax(axis=-1) == labels).astype("float32")
    confidence = jax.nn.softmax(student, axis=-1).max(axis=-1)
    place = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
    values = {"nll": nll, "right": right}
    for i in range(BINS):
        inside = (place == i).astype("float32")
        values |= {f"bin{i}": inside, f"bin{i}_right": inside * right, f"bin{i}_confidence": inside * confidence}
    for i, name in enumerate(BANDS):
        inside = (bands[labels] == i).astype("float32")
        values |= {name: inside, f"{name}_nll": inside * nll}
    return values


def _beside(
    labels: Int[Array, "batch tokens"],
    student: Float[Array, "batch tokens vocab"],
    teacher: Float[Array, "batch tokens vocab"],
) -> dict[str, Float[Array, "batch tokens"]]:
    return agreement_of(student, teacher, ranks=RANKS)


def _figures(total: Mapping[str, float]) -> Measured:
    count = max(total["count"], 1.0)
    bins = [(total[f"bin{i}_confidence"], total[f"bin{i}_right"], total[f"bin{i}"]) for i in range(BINS)]
    figures = {
        "perplexity": _perplexity(total["nll"], count),
        "accuracy": total["right"] / count,
        "ece": sum(abs(confidence - right) for confidence, right, _ in bins) / count,
        **{name: total[name] / count for name in ("kl", *(f"top{k}" for k in RANKS)) if name in total},
        **{name: _perplexity(total[f"{name}_nll"], total[name]) for name in BANDS if total[name]},
    }
    return Measured(figures, [(sure / n, right / n, n / count) for sure, right, n in bins if n])


def _perplexity(nll: float, count: float) -> float:
    return math.exp(min(nll / count, 700.0))  # above e^709 a float64 overflows


def layer_similarity(
    context: Context, student_params: PyTree, teacher_params: PyTree
) -> Float[np.ndarray, "states teacher_states"]:
    """Linear CKA (Kornblith et al. 2019, arXiv:1905.00414) of every pair of hidden states, the embeddings first.

    Of the first SIMILARITY_TOKENS tokens of held-out rows, with the estimator of HSIC that does not favour wide layers
    (Song et al. 2012, eq. 5).
    """
    assert context.teacher is not None
    student = [_gram(states) for states in _hidden_states(context, context.student, student_params)]
    teacher = [_gram(states) for states in _hidden_states(context, context.teacher, teacher_params)]
    own, others = [_hsic(gram, gram) for gram in student], [_hsic(gram, gram) for gram in teacher]
    pairs = [
        [_hsic(one, other) / math.sqrt(a * b) if a * b > 0 else 0.0 for other, b in zip(teacher, others, strict=True)]
        for one, a in zip(student, own, strict=True)
    ]
    return np.asarray(pairs)


def _hidden_states(context: Context, model: Model, params: PyTree) -> Float[np.ndarray, "states tokens width"]:
    each = -(-SIMILARITY_TOKENS // (len(context.batches[0]["input_ids"]) * len(context.batches)))

    @jax.jit
    def states(params: PyTree, batch: Mapping[str, Array]) -> tuple[Float[Array, "states tokens width"], Array]:
        outputs = intercept.apply(
            model,
            params,
            Inputs(batch["input_ids"], batch["attention_mask"], batch.get("segment_ids")),
            asked=Asked(hidden_states=True),
            mesh=context.mesh,
        )
        positions, valid = _spread(batch["attention_mask"], each)
        taken = [jnp.take_along_axis(x, positions[:, :, None], axis=1) for x in outputs.hidden_states]
        return jnp.stack([x.reshape(-1, x.shape[-1]).astype("float32") for x in taken]), valid.reshape(-1)

    pieces = []
    for batch in context.batches:
        found, valid = jax.device_get(states(params, sharding.put_batch(dict(batch), context.mesh)))
        pieces.append(found[:, valid])
    return np.concatenate(pieces, axis=1)[:, :SIMILARITY_TOKENS]


def _spread(mask: Bool[Array, "batch length"], each: int) -> tuple[Int[Array, "batch each"], Bool[Array, "batch each"]]:
    """(positions, valid): `each` real tokens of a row at equal distances, or all of a shorter row."""
    lengths = mask.sum(axis=1, keepdims=True)
    index = jnp.broadcast_to(jnp.arange(each)[None, :], (mask.shape[0], each))
    positions = jnp.where(lengths >= each, index * lengths // each, index)
    return jnp.minimum(positions, mask.shape[1] - 1), index < lengths


def _gram(states: Float[np.ndarray, "tokens width"]) -> Float[np.ndarray, "tokens tokens"]:
    centred = states - states.mean(axis=0, keepdims=True)
    gram = (centred @ centred.T).astype(np.float64)
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(one: Float[np.ndarray, "n n"], other: Float[np.ndarray, "n n"]) -> float:
    """The unbiased estimator of HSIC, of Gram matrices without their diagonals."""
    n = len(one)
    trace = float(np.sum(one * other))
    both = float(one.sum() * other.sum()) / ((n - 1) * (n - 2))
    crossed = 2 * float(one.sum(axis=0) @ other.sum(axis=0)) / (n - 2)
    return (trace + both - crossed) / (n * (n - 3))


class Speed(NamedTuple):
    """One forward pass, on one device."""

    seconds: float  # the fastest, as other programs on the machine can only make a pass slower
    memory: int  # bytes of weights, inputs, results and temporaries, as the compiler lays them out


def inputs_of(rows: int, length: int) -> Inputs:
    """Rows without padding."""
    return Inputs(jnp.ones((rows, length), jnp.int32), jnp.ones((rows, length), bool))


def compiled_pass(model: Model, params: PyTree, inputs: Inputs) -> Any:
    """The compiled forward pass, with the logits of all positions; `params` may be shapes alone."""
    run = jax.jit(lambda params, inputs: intercept.apply(model, params, inputs).logits)
    return run.lower(params, inputs).compile()


def measure_speed(model: Model, params: PyTree, *, rows: int, length: int, repetitions: int = 30) -> Speed:
    """Times the forward pass, with the logits of all positions."""
    params, inputs = jax.device_put((params, inputs_of(rows, length)), jax.local_devices()[0])
    compiled = compiled_pass(model, params, inputs)
    jax.block_until_ready(compiled(params, inputs))
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, inputs))
        times.append(time.perf_counter() - began)
    layout: Any = compiled.memory_analysis()
    parts = (layout.argument_size_in_bytes, layout.output_size_in_bytes, layout.temp_size_in_bytes)
    return Speed(min(times), int(sum(parts)))
