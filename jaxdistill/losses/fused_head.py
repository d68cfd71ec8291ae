"""LM head and every loss on its logits, together and in chunks of tokens: no [tokens, vocab] array ever exists.

The gradient of each loss in the logits has a closed form, so a chunk's logits are made once, give the loss and the
gradients of features, kernel and bias, and are gone; the backward pass only scales what was stored. That is four
matrix products of [tokens, width] x [width, vocab] (two forward, two for the gradients), as many as the dense head
needs; rematerialising the chunks instead (`jax.checkpoint`) needs six.

Under a mesh every device walks through its own rows (`jax.shard_map`), sums its kernel's gradient, and there is one
reduction at the end. Left to the partitioner, a scan over chunks of all rows would reduce once a chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses import functions as losses
from jaxdistill.losses.functions import Scalar


class Head(NamedTuple):
    """A vocabulary projection and what goes into it: logits = features @ kernel + bias.

    Products are taken in the features' dtype and summed in float32; the logits are then rounded to that dtype, as in
    the models' own classes (a chunk of them is read four times, and on an accelerator that is what takes the time).
    Losses and sums over tokens are float32. `kernel` is the transposed word embedding where the two are tied.
    """

    features: Float[Array, "*tokens width"]
    kernel: Float[Array, "width vocab"]
    bias: Float[Array, " vocab"] | None = None


# Tokens a chunk, at most, by platform. Whatever the vocabulary, a chunk reads and writes the kernel's gradient once
# ([width, vocab] float32), which must be little beside the work on its logits. On a CPU, 128 to 1,024 tokens take the
# same time. On a v5e at width 768 in bfloat16 a chunk moves 22 bytes a logit and 12 kB a word: at 1,024 tokens that is
# a third more time than its arithmetic, at 2,048 a tenth, at 4,096 none.
CHUNK = {"cpu": 512, "other": 2048}


class _Settings(NamedTuple):
    beta: float
    soft_caps: tuple[float, float]
    chunk: int
    mesh: Mesh | None


Logits = Float[Array, "tokens vocab"]
Labels = Int[Array, " tokens"]


def _through_softmax(q: Logits, of_q: Logits) -> Logits:
    """d/d(logits) of what has the derivative `of_q` in q = softmax(logits)."""
    return q * (of_q - jnp.sum(q * of_q, axis=-1, keepdims=True))


def _forward_kl(s: Logits, t: Logits, temperature: Scalar, beta: float) -> Logits:
    # Not exp(log q): on a CPU each exponential would be taken twice, 10 % of the head's time.
    p, q = (losses.softmax(x, temperature) for x in (t, s))
    return temperature * (q - p)


def _reverse_kl(s: Logits, t: Logits, temperature: Scalar, beta: float) -> Logits:
    log_p, log_q = losses.log_probs(t, temperature), losses.log_probs(s, temperature)
    return temperature * _through_softmax(jnp.exp(log_q), log_q - log_p)


def _jsd(s: Logits, t: Logits, temperature: Scalar, beta: float) -> Logits:
    if beta in (0, 1):
        return (_reverse_kl if beta else _forward_kl)(s, t, temperature, beta)
    log_p, log_q = losses.log_probs(t, temperature), losses.log_probs(s, temperature)
    _, of_q = losses.log_mixture(log_p, log_q, beta=beta)
    return temperature / beta * _through_softmax(jnp.exp(log_q), -of_q)


def _skewed_kl(s: Logits, t: Logits, temperature: Scalar, alpha: float) -> Logits:
    if alpha == 0:
        return _forward_kl(s, t, temperature, alpha)
    log_p, log_q = losses.log_probs(t, temperature), losses.log_probs(s, temperature)
    of_p, _ = losses.log_mixture(log_p, log_q, beta=alpha)
    return temperature * (1 - alpha) * _through_softmax(jnp.exp(log_q), -jnp.exp(-of_p))


def _skewed_reverse_kl(s: Logits, t: Logits, temperature: Scalar, alpha: float) -> Logits:
    if alpha == 0:
        return _reverse_kl(s, t, temperature, alpha)
    log_p, log_q = losses.log_probs(t, temperature), losses.log_probs(s, temperature)
    _, of_q = losses.log_mixture(log_p, log_q, beta=1 - alpha)
    return temperature * _through_softmax(jnp.exp(log_q), -of_q - alpha * jnp.exp(-of_q))


def _total_variation(s: Logits, t: Logits, temperature: Scalar, beta: float) -> Logits:
    p, q = jnp.exp(losses.log_probs(t, temperature)), jnp.exp(losses.log_probs(s, temperature))
    return _through_softmax(q, jnp.sign(q - p) / 2)


# The gradient in the student's logits of each of losses.DIVERGENCES, by f(s, t, temperature, beta).
GRADIENTS: dict[str, Callable[[Logits, Logits, Scalar, float], Logits]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skewed_kl": _skewed_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": _total_variation,
}


def _loss(
    name: str, s: Logits, t: Logits | None, labels: Labels, settings: _Settings, temperature: Scalar
) -> tuple[Float[Array, " tokens"], Logits]:
    """(loss of every token, its gradient in s)."""
    if name == "cross_entropy":
        label = jnp.arange(s.shape[1])[None, :] == labels[:, None]
        return losses.cross_entropy(s, labels), losses.softmax(s, 1.0) - label.astype(jnp.float32)
    assert t is not None, f"{name} needs a teacher"
    if name == "logit_mse":
        return losses.logit_mse(s, t), 2 * (s.astype(jnp.float32) - t.astype(jnp.float32))
    value, gradient = losses.DIVERGENCES[name], GRADIENTS[name]
    return value(s, t, temperature, settings.beta), gradient(s, t, temperature, settings.beta)


def fused_head(
    student: Head,
    teacher: Head | None,
    labels: Int[Array, "*tokens"],
    masks: Mapping[str, Bool[Array, "*tokens"]],
    weights: Mapping[str, Float[Array, ""]],
    *,
    temperature: Scalar,
    beta: float = 0.0,
    soft_caps: tuple[float, float] = (0.0, 0.0),
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns (sum_i weights_i S_i, {i: S_i}) with S_i the sum of loss i over the tokens of its mask.

    The gradient runs through the weighted sum alone, to the student's features, kernel and bias and to the weights;
    the S_i are for metrics and have none.

    Args:
      teacher: None where no loss looks at it; its width may be another, its vocabulary may not.
      labels: of cross_entropy; anything outside its mask.
      masks: by name of loss: those of losses.DIVERGENCES, cross_entropy and logit_mse.
      weights: by the same names.
      temperature: T of the divergences; has no gradient.
      beta: of the divergences that have one.
      soft_caps: of student's and teacher's logits, cap * tanh(logits / cap); 0 = none.
      chunk: tokens at a time on one device; None = `chunk_size`.
      mesh: splits the first axis of tokens over all its devices, which must divide it; None = one device.
    """
    if chunk is None:
        shards = 1 if mesh is None else mesh.size
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        chunk = chunk_size(tokens=labels.size // shards, platform=platform)
    settings = _Settings(beta, soft_caps, chunk, mesh)
    scalars = {name: jnp.asarray(weights[name], jnp.float32) for name in masks}
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    given = _Given(jax.lax.stop_gradient(teacher), labels, dict(masks), temperature)
    result: Any = _fused(settings, student, scalars, given)
    total, sums = result
    return total, jax.lax.stop_gradient(sums)


def chunk_size(*, tokens: int, platform: str) -> int:
    """Tokens a chunk: all, where there are few; else cut so that the chunks are about equally full."""
    chunks = -(-tokens // CHUNK.get(platform, CHUNK["other"]))
    return -(-tokens // (chunks * 8)) * 8


class _Given(NamedTuple):
    """What the total has no gradient in."""

    teacher: Head | None
    labels: Int[Array, "*tokens"]
    masks: dict[str, Bool[Array, "*tokens"]]
    temperature: Float[Array, ""]


Weights = dict[str, Float[Array, ""]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings: _Settings, student: Head, weights: Weights, given: _Given) -> Any:
    return _on_mesh(settings, student, weights, given, gradients=False)[0]


def _forward(settings: _Settings, student: Head, weights: Weights, given: _Given) -> tuple[Any, Any]:
    (total, sums), gradients = _on_mesh(settings, student, weights, given, gradients=True)
    return (total, sums), (gradients, sums)


def _backward(settings: _Settings, stored: Any, cotangents: Any) -> tuple:
    gradients, sums = stored
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), (gradients, sums))
    return *scaled, None


_fused.defvjp(_forward, _backward)


def _on_mesh(
    settings: _Settings, student: Head, weights: Weights, given: _Given, *, gradients: bool
) -> tuple[tuple[Array, dict[str, Array]], Head | None]:
    """((weighted total, sums), gradient of the total in the student's head)."""
    local = partial(_in_chunks, settings, gradients=gradients)
    if settings.mesh is None or settings.mesh.size == 1:
        sums, gradient = local(student, weights, given)
    else:
        axes = settings.mesh.axis_names
        rows, whole = PartitionSpec(axes), PartitionSpec()
        head: Any = (rows, whole, whole)
        head = Head(*head)  # a kernel split over the mesh is gathered here, once and not once a chunk
        split: Any = given.teacher and head, rows, rows, whole

        def summed(*args: Any) -> tuple[dict[str, Array], Head | None]:
            sums, gradient = local(*args)
            if gradient is None:
                return jax.lax.psum(sums, axes), None
            sums, kernel, bias = jax.lax.psum((sums, gradient.kernel, gradient.bias), axes)
            return sums, Head(gradient.features, kernel, bias)

        sums, gradient = jax.shard_map(
            summed,
            mesh=settings.mesh,
            in_specs=(head, whole, _Given(*split)),
            out_specs=(whole, head if gradients else None),
            check_vma=False,
        )(student, weights, given)
    total = jnp.stack([weights[name] * sums[name] for name in sums]).sum()
    return (total, sums), gradient


def _in_chunks(
    settings: _Settings, student: Head, weights: Weights, given: _Given, *, gradients: bool
) -> tuple[dict[str, Array], Head | None]:
    """(sum of each loss, gradient of their weighted total in the student's head) of this device's tokens."""
    teacher, labels, masks, temperature = given
    tokens, chunk = labels.size, settings.chunk
    chunks = -(-tokens // chunk)

    def cut(x: Array) -> Array:
        """[*tokens ...] -> [chunks, chunk ...]; what is filled in is 0 and masked out."""
        flat = x.reshape(tokens, *x.shape[labels.ndim :])
        flat = jnp.pad(flat, [(0, chunks * chunk - tokens), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(chunks, chunk, *flat.shape[1:])

    # Cast here, and so once and not once a chunk.
    cast = lambda head: head._replace(kernel=head.kernel.astype(head.features.dtype))  # noqa: E731
    learning, teaching = cast(student), teacher and cast(teacher)

    def one(piece: Any) -> tuple[Any, Array | None]:
        """((sums, gradient of kernel, of bias), gradient of features) of a chunk."""
        (own, taught), labels, masks = piece
        s = logits(learning._replace(features=own), cap=settings.soft_caps[0])
        t = teaching and logits(teaching._replace(features=taught), cap=settings.soft_caps[1])
        values, slope = {}, jnp.zeros(s.shape, jnp.float32)
        for name, mask in masks.items():
            value, gradient = _loss(name, s, t, labels, settings, temperature)
            values[name] = losses.masked_sum(value, mask)
            slope += jnp.where(mask[:, None], weights[name] * gradient, 0.0)
        if not gradients:
            return (values, None, None), None
        if cap := settings.soft_caps[0]:
            slope *= 1 - jnp.square(s.astype(jnp.float32) / cap)
        rounded = slope.astype(own.dtype)
        kernel = jnp.matmul(own.T, rounded, preferred_element_type=jnp.float32)
        back = jnp.matmul(rounded, learning.kernel.T, preferred_element_type=jnp.float32)
        bias = None if student.bias is None else rounded.sum(axis=0, dtype=jnp.float32)
        return (values, kernel, bias), back.astype(own.dtype)

    def step(total: Any, piece: Any) -> tuple[Any, Array | None]:
        more, back = one(piece)
        return jax.tree.map(jnp.add, total, more), back

    pieces = jax.tree.map(cut, ((student.features, teacher and teacher.features), labels, masks))
    first = jax.tree.map(lambda x: x[0], pieces)
    if chunks == 1:
        result, back = one(first)
    else:
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, first)[0])
        result, back = jax.lax.scan(step, zeros, pieces)
    values, kernel, bias = result
    if kernel is None or back is None:
        return values, None
    back = back.reshape(chunks * chunk, -1)[:tokens].reshape(student.features.shape)
    whole = Head(back, kernel, bias)
    return values, jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), whole, student)


def logits(head: Head, *, cap: float = 0.0) -> Float[Array, "*tokens vocab"]:
    """The array itself, for a few tokens at a time; `cap` as in soft_caps."""
    kernel = head.kernel.astype(head.features.dtype)
    values = jnp.matmul(head.features, kernel, preferred_element_type=jnp.float32)
    if head.bias is not None:
        values += jnp.broadcast_to(head.bias.astype(jnp.float32), values.shape)
    return (cap * jnp.tanh(values / cap) if cap else values).astype(head.features.dtype)
