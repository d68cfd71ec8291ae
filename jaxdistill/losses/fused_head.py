"""LM head and every loss on its logits, together and in chunks of tokens: no [tokens, vocab] array ever exists.

The gradient of each loss in the logits has a closed form, so a chunk's logits are made once, give the loss and the
gradients of features, kernel and bias, and are gone; the backward pass only scales what was stored. That is four
matrix products of [tokens, width] x [width, vocab] (two forward, two for the gradients), as many as the dense head
needs; rematerialising the chunks instead (`jax.checkpoint`) needs six.

Under a mesh every device walks through its own rows (`jax.shard_map`), sums its kernel's gradient, and there is one
reduction at the end. Left to the partitioner, a scan over chunks of all rows would reduce once a chunk.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.divergences import LogitLoss, Scalar, masked_sum
from jaxdistill.losses.several import Target, each, resolved
from jaxdistill.models.axes import ROWS, TENSOR, row_devices
from jaxdistill.models.head import Head, before_bound, logits
from jaxdistill.models.partition import words_stay

# Tokens a chunk, at most, by platform. Whatever the vocabulary, a chunk reads and writes the kernel's gradient once
# ([width, vocab] float32), which must be little beside the work on its logits. On a CPU, 128 to 1,024 tokens take the
# same time. On a v5e at width 768 in bfloat16 a chunk moves 22 bytes a logit and 12 kB a word: at 1,024 tokens that is
# a third more time than its arithmetic, at 2,048 a tenth, at 4,096 none.
CHUNK = {"cpu": 512, "other": 2048}


class HeadLoss(NamedTuple):
    """A loss on logits, the tokens that it is summed over, and the weight of the sum."""

    loss: LogitLoss
    mask: Bool[Array, "*tokens"]
    weight: Float[Array, ""] | float


def fused_head(
    student: Head,
    teacher: Target,
    labels: Int[Array, "*tokens"],
    losses: Mapping[str, HeadLoss],
    *,
    temperature: Scalar,
    beta: float = 0.0,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns (sum_i weight_i S_i, {i: S_i}) with S_i the sum of loss i over the tokens of its mask.

    The gradient runs through the weighted sum alone, to the student's features, kernel and bias and to the weights;
    the S_i are for metrics and have none.

    Args:
      teacher: None where no loss compares with it; its width may differ from the student's, its vocabulary may not. Or
        what a cache holds of its distributions, or several of either.
      labels: the targets of losses on labels; anything outside their masks.
      losses: by any names.
      temperature: T of the divergences; has no gradient.
      beta: parameter of the divergences that have one.
      chunk: tokens at a time on one device; None = `chunk_size`.
      mesh: splits the first axis of tokens over all its devices, which must divide it; None = one device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if chunk is None:
        chunk = chunk_size(tokens=labels.size // (1 if mesh is None else row_devices(mesh)), platform=platform)
    # In an order of their own, so that sums round alike whatever names the losses have.
    in_order = tuple((name, x.loss) for name, x in sorted(losses.items(), key=lambda item: item[1].loss.name))
    settings = _Settings(in_order, beta, chunk, mesh, platform)
    weights = {name: jnp.asarray(x.weight, jnp.float32) for name, x in losses.items()}
    masks = {name: x.mask for name, x in losses.items()}
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    constants = _Constants(jax.lax.stop_gradient(teacher), labels, masks, temperature)
    result: Any = _differentiable(settings, student, weights, constants)
    total, sums = result
    return total, jax.lax.stop_gradient(sums)


def chunk_size(*, tokens: int, platform: str) -> int:
    """Tokens a chunk: all, where there are few; else cut so that the chunks are about equally full."""
    chunks = -(-tokens // CHUNK.get(platform, CHUNK["other"]))
    return -(-tokens // (chunks * 8)) * 8


class _Settings(NamedTuple):
    """The static arguments."""

    losses: tuple[tuple[str, LogitLoss], ...]
    beta: float
    chunk: int
    mesh: Mesh | None
    platform: str


class _Constants(NamedTuple):
    """The arguments that the total has no gradient in."""

    teacher: Target
    labels: Int[Array, "*tokens"]
    masks: dict[str, Bool[Array, "*tokens"]]
    temperature: Float[Array, ""]


Scalars = dict[str, Float[Array, ""]]  # by name of a loss


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(settings: _Settings, student: Head, weights: Scalars, constants: _Constants) -> Any:
    return _on_mesh(settings, student, weights, constants, gradients=False)[0]


def _forward(settings: _Settings, student: Head, weights: Scalars, constants: _Constants) -> tuple[Any, Any]:
    (total, sums), gradients = _on_mesh(settings, student, weights, constants, gradients=True)
    return (total, sums), (gradients, sums)


def _backward(settings: _Settings, kept: Any, cotangents: Any) -> tuple:
    gradients, sums = kept
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), (gradients, sums))
    return *scaled, None


_differentiable.defvjp(_forward, _backward)


def _on_mesh(
    settings: _Settings, student: Head, weights: Scalars, constants: _Constants, *, gradients: bool
) -> tuple[tuple[Array, Scalars], Head | None]:
    """((weighted total, sums), gradient of the total in the student's head)."""
    local = partial(_in_chunks, settings, gradients=gradients)
    if settings.mesh is None or row_devices(settings.mesh) == 1:
        sums, gradient = local(student, weights, constants)
    else:
        axes = ROWS
        rows, whole = PartitionSpec(axes), PartitionSpec()

        def split(head: Any) -> Any:
            """A kernel that is split over the mesh is gathered here, once and not once a chunk."""
            return head and head._replace(features=rows, kernel=whole, bias=whole)

        of_teacher = each(lambda one: split(one) if isinstance(one, Head) else rows, constants.teacher)
        of_constants: Any = of_teacher, rows, rows, whole

        def summed(*args: Any) -> tuple[Scalars, Head | None]:
            sums, gradient = local(*args)
            if gradient is None:
                return jax.lax.psum(sums, axes), None
            sums, kernel, bias = jax.lax.psum((sums, gradient.kernel, gradient.bias), axes)
            return sums, words_stay(gradient._replace(kernel=kernel, bias=bias), settings.mesh)

        sums, gradient = jax.shard_map(
            summed,
            mesh=settings.mesh,
            in_specs=(split(student), whole, _Constants(*of_constants)),
            out_specs=(whole, split(student) if gradients else None),
            # The compiler splits words over `tensor`; a mesh without it has nothing that the compiler should split.
            axis_names=set(ROWS if settings.mesh.shape[TENSOR] > 1 else settings.mesh.axis_names),
            check_vma=False,
        )(student, weights, constants)
    total = jnp.stack([weights[name] * sums[name] for name, _ in settings.losses]).sum()
    return (total, sums), gradient


def _in_chunks(
    settings: _Settings, student: Head, weights: Scalars, constants: _Constants, *, gradients: bool
) -> tuple[Scalars, Head | None]:
    """(sum of each loss, gradient of their weighted total in the student's head) of this device's tokens."""
    teacher, labels, masks, temperature = constants
    student = words_stay(student, settings.mesh)
    teacher = each(lambda one: words_stay(one, settings.mesh) if isinstance(one, Head) else one, teacher)
    assert student.features is not None
    tokens, chunk = labels.size, settings.chunk
    chunks = -(-tokens // chunk)

    def cut(x: Array) -> Array:
        """[*tokens ...] -> [chunks, chunk ...]; the last chunk is filled up with 0, which the masks leave out."""
        flat = x.reshape(tokens, *x.shape[labels.ndim :])
        flat = jnp.pad(flat, [(0, chunks * chunk - tokens), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(chunks, chunk, *flat.shape[1:])

    # Cast here, and so once and not once a chunk.
    student_cast = _in_dtype_of_features(student)
    teacher_cast = each(lambda one: _in_dtype_of_features(one) if isinstance(one, Head) else one, teacher)

    def one(piece: Any) -> tuple[Any, Array | None]:
        (of_student, of_teacher), labels, masks = piece
        other = each(lambda one, x: one._replace(features=x) if isinstance(one, Head) else x, teacher_cast, of_teacher)
        own = student_cast._replace(features=of_student)
        return _one_chunk(settings, own, weights, _Constants(other, labels, masks, temperature), gradients=gradients)

    def step(total: Any, piece: Any) -> tuple[Any, Array | None]:
        more, of_features = one(piece)
        return jax.tree.map(jnp.add, total, more), of_features

    by_token = each(lambda one: one.features if isinstance(one, Head) else one, teacher)
    pieces = jax.tree.map(cut, ((student.features, by_token), labels, masks))
    first = jax.tree.map(lambda x: x[0], pieces)
    if chunks == 1:
        result, of_features = one(first)
    else:
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, first)[0])
        result, of_features = jax.lax.scan(step, zeros, pieces)
    values, kernel, bias = result
    if kernel is None or of_features is None:
        return values, None
    of_features = of_features.reshape(chunks * chunk, -1)[:tokens].reshape(student.features.shape)
    gradient = student._replace(features=of_features, kernel=kernel, bias=bias)
    return values, jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, student)


def _one_chunk(
    settings: _Settings, student: Head, weights: Scalars, constants: _Constants, *, gradients: bool
) -> tuple[tuple[Scalars, Array | None, Array | None], Array | None]:
    """((sums, gradient of kernel, of bias), gradient of features); all gradients are None unless asked for."""
    features = student.features
    assert features is not None
    s = logits(student)
    t = each(lambda one: logits(one) if isinstance(one, Head) else one, constants.teacher)
    sums, slope = {}, jnp.zeros(s.shape, jnp.float32)
    for name, loss in settings.losses:
        target, mask = constants.labels if loss.target == "labels" else t, constants.masks[name]
        loss, target = resolved(loss, target, words=s.shape[-1], temperature=constants.temperature)
        sums[name] = masked_sum(loss.value(s, target, constants.temperature, settings.beta), mask)
        gradient = loss.slope(s, target, constants.temperature, settings.beta)
        slope += jnp.where(mask[:, None], weights[name] * gradient, 0.0)
    if not gradients:
        return (sums, None, None), None
    slope = before_bound(slope, s, cap=student.cap, scale=student.scale)
    rounded = slope.astype(features.dtype)
    to_kernel, to_features = ("tv,tw->vw", "tv,vw->tw") if student.tied else ("tv,tw->wv", "tv,wv->tw")
    kernel = jnp.einsum(to_kernel, rounded, features, preferred_element_type=jnp.float32)
    of_features = jnp.einsum(to_features, rounded, student.kernel, preferred_element_type=jnp.float32)
    bias = None if student.bias is None else _sum_over_tokens(rounded, settings.platform)
    return (sums, kernel, bias), of_features.astype(features.dtype)


def _sum_over_tokens(values: Float[Array, "tokens vocab"], platform: str) -> Float[Array, " vocab"]:
    if platform != "cpu":
        return values.sum(axis=0, dtype=jnp.float32)  # in the pass that makes the values
    # There the sum over the first axis takes fifteen times as long as this product.
    return jnp.matmul(jnp.ones(len(values), values.dtype), values, preferred_element_type=jnp.float32)


def _in_dtype_of_features(head: Head) -> Head:
    assert head.features is not None
    return head._replace(kernel=head.kernel.astype(head.features.dtype))
