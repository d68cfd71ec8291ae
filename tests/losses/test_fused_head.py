"""The fused head against torch in float64 and against the dense head: value, every gradient, memory, devices."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.losses import fused_head as fused
from jaxdistill.losses import terms as objectives
from jaxdistill.losses.divergences import CROSS_ENTROPY, DIVERGENCES, LOGIT_MSE
from jaxdistill.losses.fused_head import HeadLoss
from jaxdistill.losses.term import Objective, Signals
from jaxdistill.models import intercept
from jaxdistill.models.head import Head, logits
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.positions import gather_tokens, head_positions
from jaxdistill.step import optimizer as optim
from jaxdistill.step import sharding

ROWS, LENGTH, VOCAB, WIDTHS, TEMPERATURE = 3, 7, 19, (6, 9), 2.0
# loss -> beta
CASES = {
    "forward_kl": 0.0,
    "reverse_kl": 0.0,
    "symmetric_kl": 0.0,
    "jsd": 0.3,
    "skewed_kl": 0.1,
    "skewed_reverse_kl": 0.1,
    "total_variation": 0.0,
    "cross_entropy": 0.0,
    "logit_mse": 0.0,
}
LOSSES = {**DIVERGENCES, "cross_entropy": CROSS_ENTROPY, "logit_mse": LOGIT_MSE}
# what else there is of the student's and of the teacher's head
KINDS = [
    ({}, {}),
    ({"cap": 2.0, "tied": True}, {"cap": 3.0, "tied": True}),
    ({"scale": 0.3}, {"cap": 3.0, "scale": 2.0, "tied": True}),
]


def make_inputs(seed: int = 0, *, rows: int = ROWS, bias: bool = True, dtype: Any = np.float32) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    heads = [Head(draw(rows, LENGTH, width), draw(width, VOCAB), draw(VOCAB) if bias else None) for width in WIDTHS]
    head, labelled = rng.random((2, rows, LENGTH)) < np.array([0.7, 0.3])[:, None, None]
    labels = np.where(labelled, rng.integers(0, VOCAB, labelled.shape), -100).astype(np.int32)
    return SimpleNamespace(student=heads[0], teacher=heads[1], labels=labels, head=head, labelled=labelled)


def of_kinds(x: SimpleNamespace, kinds: tuple[dict, dict]) -> SimpleNamespace:
    def changed(h: Head, kind: dict) -> Head:
        return h._replace(**kind, kernel=h.kernel.T.copy() if kind.get("tied") else h.kernel)

    student, teacher = (changed(h, kind) for h, kind in zip((x.student, x.teacher), kinds, strict=True))
    return SimpleNamespace(**{**vars(x), "student": student, "teacher": teacher})


def masks_of(x: SimpleNamespace, names: Any) -> dict[str, np.ndarray]:
    return {name: x.labelled if name == "cross_entropy" else x.head for name in names}


def weights_of(names: Any) -> dict[str, float]:
    return {name: 0.5 + i for i, name in enumerate(names)}


def head_losses(masks: Any, weights: Any) -> dict[str, HeadLoss]:
    return {name: HeadLoss(LOSSES[name], mask, weights[name]) for name, mask in masks.items()}


def graded(names: tuple[str, ...], **options: Any) -> Any:
    """Jitted (student, teacher, labels, masks, weights) -> ((total, sums), gradients of student and weights)."""

    def total(student: Head, weights: Any, teacher: Any, labels: Any, masks: Any) -> Any:
        return fused.fused_head(
            student, teacher, labels, head_losses(masks, weights), temperature=TEMPERATURE, **options
        )

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def run(x: SimpleNamespace, names: tuple[str, ...], **options: Any) -> Any:
    f = graded(names, **options)
    return f(x.student, weights_of(names), x.teacher, x.labels, masks_of(x, names))


def torch_losses(s: Any, t: Any, labels: Any, *, beta: float) -> dict[str, torch.Tensor]:
    """Each formula as it is written in its paper, probabilities and logarithms, in float64."""
    p, q = F.softmax(t / TEMPERATURE, -1), F.softmax(s / TEMPERATURE, -1)
    kl = lambda a, b: torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(-1)  # noqa: E731
    mixed = lambda share: share * p + (1 - share) * q  # noqa: E731
    squared = TEMPERATURE**2
    safe = torch.where(labels < 0, 0, labels)
    result = {
        "forward_kl": squared * kl(p, q),
        "reverse_kl": squared * kl(q, p),
        "symmetric_kl": squared * (kl(p, q) + kl(q, p)),
        "skewed_kl": squared * kl(p, mixed(beta)),
        "skewed_reverse_kl": squared * kl(q, mixed(1 - beta)),
        "total_variation": TEMPERATURE / 2 * (p - q).abs().sum(-1),
        "cross_entropy": F.cross_entropy(s.flatten(0, 1), safe.flatten(), reduction="none").reshape(labels.shape),
        "logit_mse": (s - t).square().sum(-1),
    }
    if 0 < beta < 1:
        middle = mixed(beta)
        unscaled = beta * kl(p, middle) + (1 - beta) * kl(q, middle)
        result["jsd"] = squared / (beta * (1 - beta)) * unscaled
    return result


def by_torch(x: SimpleNamespace, names: Any, *, beta: float = 0.0) -> tuple[float, dict[str, float], Head]:
    """(total, sums, gradient) of logits written out."""

    def tensor(a: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(a, np.float64), requires_grad=True)

    def logits(h: Head) -> torch.Tensor:
        raw = h.features @ (h.kernel.T if h.tied else h.kernel) + (0 if h.bias is None else h.bias)
        if x.student.features.dtype == jnp.bfloat16:  # the logits are, too
            raw = raw + (raw.detach().bfloat16().double() - raw.detach())
        return h.cap * torch.tanh(h.scale * raw / h.cap) if h.cap else h.scale * raw

    student, teacher = (jax.tree.map(tensor, h) for h in (x.student, x.teacher))
    s, t = logits(student), logits(teacher).detach()
    values = torch_losses(s, t, torch.tensor(x.labels.astype(np.int64)), beta=beta)
    masks = {name: torch.tensor(mask) for name, mask in masks_of(x, names).items()}
    sums = {name: torch.where(masks[name], values[name], 0.0).sum() for name in names}
    total = sum(weight * sums[name] for name, weight in weights_of(names).items())
    total.backward()
    gradient = jax.tree.map(lambda a: a.grad.numpy(), student)
    return total.item(), {name: value.item() for name, value in sums.items()}, gradient


def assert_near(ours: Any, theirs: Any, *, tolerance: float = 1e-5) -> None:
    """Each leaf to a share of its own largest entry."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        largest = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=str(path))


@pytest.mark.parametrize("name", CASES)
def test_each_loss_and_its_gradients_against_torch(name: str) -> None:
    x = make_inputs()
    total, sums, gradient = by_torch(x, (name,), beta=CASES[name])
    ((ours, our_sums), (our_gradient, _)) = run(x, (name,), beta=CASES[name], chunk=8)
    assert float(ours) == pytest.approx(total, rel=2e-6) and float(our_sums[name]) == pytest.approx(
        sums[name], rel=2e-6
    )
    assert_near(our_gradient, gradient)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kinds", KINDS)
def test_all_together_for_every_kind_of_head(bias: bool, kinds: tuple[dict, dict]) -> None:
    x, names = of_kinds(make_inputs(1, bias=bias), kinds), ("jsd", "cross_entropy", "logit_mse", "total_variation")
    total, sums, gradient = by_torch(x, names, beta=0.5)
    ((ours, our_sums), (our_gradient, of_weights)) = run(x, names, beta=0.5, chunk=5)
    assert float(ours) == pytest.approx(total, rel=2e-6)
    assert {name: float(value) for name, value in our_sums.items()} == pytest.approx(sums, rel=2e-6)
    assert_near(our_gradient, gradient)
    assert {name: float(value) for name, value in of_weights.items()} == pytest.approx(sums, rel=2e-6)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def both_gradients(s: jax.Array, t: jax.Array, name: str, temperature: float, beta: float) -> tuple:
    loss = DIVERGENCES[name]
    dense = jax.grad(lambda s: loss.value(s, t, temperature, beta).sum())(s)
    return loss.slope(s, t, temperature, beta), dense


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 10.0]), temperature=st.sampled_from([1.0, 3.0]))
@settings(max_examples=10, deadline=None)
def test_closed_forms_are_what_autodiff_gives(name: str, seed: int, scale: float, temperature: float) -> None:
    s, t = np.random.default_rng(seed).normal(0, scale, (2, 4, VOCAB)).astype(np.float32)
    for beta in (0.2, 1.0) if name == "jsd" else (0.2, 0.0):
        closed, dense = both_gradients(s, t, name, temperature, beta)
        np.testing.assert_allclose(closed, dense, rtol=1e-4, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("chunk", [1, 4, 8, 21, 64, None])
def test_the_chunk_changes_nothing(chunk: int | None) -> None:
    """21 tokens: chunks of one, of what divides, of what does not, of all, of more than there are."""
    x, names = make_inputs(2), ("forward_kl", "cross_entropy")
    whole = run(x, names, chunk=21)
    ours = run(x, names, chunk=chunk)
    assert_near(ours, whole, tolerance=2e-6)


@given(tokens=st.integers(1, 10**6), platform=st.sampled_from(["cpu", "tpu"]))
@settings(deadline=None)
def test_chunk_size(tokens: int, platform: str) -> None:
    chunk, most = fused.chunk_size(tokens=tokens, platform=platform), {"cpu": 512, "tpu": 2048}[platform]
    chunks = -(-tokens // chunk)
    assert chunk % 8 == 0 and 0 < chunk <= most
    assert chunks * chunk - tokens < 8 * chunks  # hardly any padding
    assert (chunks == 1) == (tokens <= most)


def test_without_a_gradient_it_is_the_same_value() -> None:
    x, names = make_inputs(3), ("forward_kl", "cross_entropy")
    wanted = run(x, names, chunk=5)[0]
    x = jax.tree.map(jnp.asarray, (x.student, x.teacher, x.labels, masks_of(x, names), weights_of(names)))

    @jax.jit
    def value_of(student: Head, teacher: Head, labels: Any, masks: Any, weights: Any) -> Any:
        losses = head_losses(masks, weights)
        return fused.fused_head(student, teacher, labels, losses, temperature=TEMPERATURE, chunk=5)

    value = value_of(*x)
    assert_near(value, wanted, tolerance=1e-6)


def test_the_gradient_runs_through_the_total_alone() -> None:
    x, names = make_inputs(4), ("forward_kl", "cross_entropy")
    labels, masks, weights = jax.tree.map(jnp.asarray, (x.labels, masks_of(x, names), weights_of(names)))
    losses = head_losses(masks, weights)

    def of(student: Head, teacher: Head, *, output: int) -> jax.Array:
        result = fused.fused_head(student, teacher, labels, losses, temperature=TEMPERATURE, chunk=8)[output]
        return 3.0 * jnp.sum(jnp.stack(jax.tree.leaves(result)))

    graded = jax.jit(jax.grad(of, argnums=(0, 1)), static_argnames="output")
    of_total, of_sums = (graded(x.student, x.teacher, output=output) for output in (0, 1))
    assert all(not np.any(g) for g in jax.tree.leaves((of_total[1], of_sums)))
    once = run(x, names, chunk=8)[1][0]
    assert_near(of_total[0], jax.tree.map(lambda g: 3.0 * g, once), tolerance=1e-6)


def test_without_a_teacher() -> None:
    x = make_inputs(5)
    alone = SimpleNamespace(**{**vars(x), "teacher": None})
    assert_near(run(alone, ("cross_entropy",), chunk=8), run(x, ("cross_entropy",), chunk=8))


def test_what_is_masked_out_is_not_seen() -> None:
    x, names = make_inputs(6), ("reverse_kl", "cross_entropy", "logit_mse")
    outside = ~(x.head | x.labelled)
    rng = np.random.default_rng(0)

    def disturb(h: Head) -> Head:
        junk = 1e3 * rng.normal(size=h.features.shape).astype(np.float32)
        return h._replace(features=np.where(outside[..., None], junk, h.features))

    labels = np.where(x.labelled, x.labels, rng.integers(-100, VOCAB, x.labels.shape)).astype(np.int32)
    y = SimpleNamespace(**{**vars(x), "student": disturb(x.student), "teacher": disturb(x.teacher), "labels": labels})
    assert outside.any()
    clean, dirty = run(x, names, chunk=8), run(y, names, chunk=8)
    assert_near(dirty, clean, tolerance=1e-6)
    assert not np.any(np.asarray(dirty[1][0].features)[outside])


@pytest.mark.parametrize("name", CASES)
def test_an_empty_mask_gives_zero(name: str) -> None:
    x = make_inputs(7)
    x.head, x.labelled = np.zeros_like(x.head), np.zeros_like(x.labelled)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(run(x, (name,), beta=CASES[name], chunk=8)))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_words_ruled_out_by_minus_infinity(name: str, both: bool) -> None:
    x = make_inputs(8)
    x.teacher.bias[4] = -np.inf
    if both:
        x.student.bias[4] = -np.inf
    (total, _), (gradient, _) = run(x, (name,), beta=CASES[name], chunk=8)
    assert np.isfinite(total) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    if both:  # as if the vocabulary did not have the word
        rest = [i for i in range(VOCAB) if i != 4]
        for h in ("student", "teacher"):
            old = getattr(x, h)
            setattr(x, h, Head(old.features, old.kernel[:, rest], old.bias[rest]))
        wanted, _, wanted_gradient = by_torch(x, (name,), beta=CASES[name])
        assert float(total) == pytest.approx(wanted, rel=1e-5)
        assert_near(gradient.features, wanted_gradient.features)
        assert not np.any(np.asarray(gradient.bias)[4]) and not np.any(np.asarray(gradient.kernel)[:, 4])
    elif name not in ("reverse_kl", "symmetric_kl"):  # which are infinite by the formula
        assert float(total) == pytest.approx(by_torch(x, (name,), beta=CASES[name])[0], rel=1e-5)
    else:
        assert float(gradient.bias[4]) > 0  # it is pushed down


@pytest.mark.parametrize("kinds", [KINDS[0], ({"tied": True}, {"tied": True})])
def test_bfloat16_features_accumulate_in_float32(kinds: tuple[dict, dict]) -> None:
    """600 times the same token, two at a time: a sum kept in bfloat16 stands still at 256 times."""
    rng = np.random.default_rng(9)
    heads = [
        Head(
            jnp.broadcast_to(jnp.asarray(rng.normal(size=width), jnp.bfloat16), (1, 600, width)),
            jnp.asarray(jnp.asarray(rng.normal(size=(width, VOCAB)), jnp.bfloat16), jnp.float32),
        )
        for width in WIDTHS
    ]
    ones = np.ones((1, 600), bool)
    x = SimpleNamespace(
        student=heads[0], teacher=heads[1], labels=np.zeros((1, 600), np.int32), head=ones, labelled=ones
    )
    x, names = of_kinds(x, kinds), ("forward_kl", "cross_entropy")
    total, _, wanted = by_torch(x, names)
    (ours, _), (gradient, _) = run(x, names, chunk=2)
    assert ours.dtype == jnp.float32 and float(ours) == pytest.approx(total, rel=1e-5)
    assert gradient.features.dtype == jnp.bfloat16 and gradient.kernel.dtype == jnp.float32
    # One rounding of each token's gradient to bfloat16 (2^-9), before the products.
    assert_near(gradient.kernel, wanted.kernel, tolerance=4e-3)
    assert_near(np.asarray(gradient.features, np.float32), wanted.features, tolerance=1e-2)


def shapes(tokens: int, vocab: int, width: int = 16) -> tuple:
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    head = Head(array(jnp.float32, tokens, width), array(jnp.float32, width, vocab), array(jnp.float32, vocab))
    masks = {name: array(bool, tokens) for name in ("forward_kl", "cross_entropy")}
    weights = dict.fromkeys(masks, array(jnp.float32))
    return head, weights, head, array(jnp.int32, tokens), masks


def test_memory_grows_with_the_chunk_and_not_with_tokens_times_vocabulary() -> None:
    vocab, names = 5_000, ("forward_kl", "cross_entropy")

    def temporary(tokens: int, chunk: int) -> tuple[int, str]:
        program = graded(names, chunk=chunk).lower(*shapes(tokens, vocab)).compile()
        return program.memory_analysis().temp_size_in_bytes, program.as_text()

    (few, _), (many, text) = temporary(512, 64), temporary(4096, 64)
    assert many - few < (4096 - 512) * 16 * 4 * 8  # a few arrays of the features' size: 1/39 of one of the logits'
    assert not re.search(r"\[(4096|64,64),5000\]", text)
    assert temporary(4096, 256)[0] > 2.5 * many


@pytest.mark.parametrize(("mesh_shape", "kinds"), [((8, 1), KINDS[0]), ((2, 4), KINDS[1]), ((2, 1), KINDS[2])])
def test_several_devices_are_one(mesh_shape: tuple[int, int], kinds: tuple[dict, dict]) -> None:
    """Rows over both axes, kernel and bias split over the vocabulary by fsdp: each device walks its own rows."""
    data, fsdp = mesh_shape
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    rng = np.random.default_rng(10)
    x, names = make_inputs(10, rows=16), ("forward_kl", "cross_entropy")
    vocab = 20  # fsdp divides it
    x.student = Head(x.student.features, rng.normal(size=(6, vocab)).astype(np.float32), np.ones(vocab, np.float32))
    x.teacher = Head(x.teacher.features, rng.normal(size=(9, vocab)).astype(np.float32))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    x = of_kinds(x, kinds)

    def head(h: Head) -> Head:
        kernel = put(h.kernel, *("fsdp", None) if h.tied else (None, "fsdp"))
        bias = h.bias if h.bias is None else put(h.bias, "fsdp")
        return h._replace(features=put(h.features, sharding.ROWS), kernel=kernel, bias=bias)

    masks = {name: put(mask, sharding.ROWS) for name, mask in masks_of(x, names).items()}
    f = graded(names, chunk=4, mesh=mesh)
    arguments = (head(x.student), weights_of(names), head(x.teacher), put(x.labels, sharding.ROWS), masks)
    assert_near(f(*arguments), run(x, names, chunk=4), tolerance=2e-6)
    # No device is given another's tokens, and nothing is exchanged once a chunk.
    features, computation = x.student.features.size, ""
    for line in f.lower(*arguments).compile().as_text().splitlines():
        if header := re.match(r"(ENTRY )?%?[\w.-]+ .*\{$", line):
            computation = header[1] or ""
        if found := re.search(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\(", line):
            assert computation == "ENTRY ", line
            sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\[([\d,]+)\]", found[1])]
            assert all(size < features for size in sizes), line


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_fused_objective_is_the_dense_one(divergence: str) -> None:
    x = of_kinds(make_inputs(11), KINDS[2])
    masks = {"tokens": jnp.asarray(x.head), "head": jnp.asarray(x.head), "labels": jnp.asarray(x.labelled)}
    aim = Objective({"mse": 0.1, "ce": 5.0, "mlm": 2.0}, TEMPERATURE, "all", (), divergence=divergence, beta=0.3)
    counts = objectives.token_counts(
        objectives.masks_of(aim, {"attention_mask": masks["head"], "label_mask": masks["labels"]})
    )

    @jax.jit
    def dense(student: Head) -> Any:
        heads = student, jax.tree.map(jnp.asarray, x.teacher)
        outputs = [intercept.Outputs(logits(h), (), ()) for h in heads]
        return objectives.weighted_sum(aim, Signals(*outputs, jnp.asarray(x.labels), masks, {}), counts)

    @jax.jit
    def chunked(student: Head) -> Any:
        nothing = intercept.Outputs(jnp.zeros((0, 0, 0)), (), ())
        signals = Signals(nothing, nothing, jnp.asarray(x.labels), masks, {}, (student, x.teacher))
        return objectives.weighted_sum(aim, signals, counts)

    (value, means), (wanted, wanted_means) = chunked(x.student), dense(x.student)
    assert list(means) == list(wanted_means)
    assert_near((value, means), (wanted, wanted_means), tolerance=1e-6)
    gradients = [jax.grad(lambda h, f=f: f(h)[0])(x.student) for f in (chunked, dense)]
    assert_near(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tie"), tiny.families(grids.covering(tiny.INSTALLED, (False, True)), fast=(), weekly=True)
)
def test_every_family_fused_is_dense(kind: str, tie: bool) -> None:
    """The whole model, at chosen positions: loss and the gradient of every parameter, a shared embedding's too."""
    overrides = {**tiny.depth(kind, 2 if kind == "albert" else 1), "tie_word_embeddings": tie}
    model, params = tiny.model(kind, **overrides), tiny.params(kind, **overrides)
    rng = np.random.default_rng(12)
    ids, mask = (jnp.asarray(array) for array in tiny.batch(kind, rows=4))
    label_mask = mask & jnp.asarray(rng.random(mask.shape) < 0.4)
    positions, valid = head_positions(label_mask, group=2, capacity=7)
    labels = gather_tokens(jnp.asarray(rng.integers(0, 101, mask.shape)), positions)
    masks = {"tokens": mask, "labels": valid, "head": valid}
    aim = Objective({"ce": 5.0, "mlm": 2.0, "mse": 0.1}, TEMPERATURE, "masked", ())
    counts = objectives.token_counts(objectives.masks_of(aim, {"attention_mask": mask, "label_mask": label_mask}))
    teacher_logits = jnp.asarray(rng.normal(size=(*positions.shape, 101)), jnp.float32)
    teacher = intercept.Outputs(teacher_logits, (), ())
    taught = Head(teacher_logits, jnp.eye(101))

    def both(params: Any) -> Any:
        student = intercept.apply(model, params, Inputs(ids, mask), positions=positions)
        dense = objectives.weighted_sum(aim, Signals(student, teacher, labels, masks, {}), counts)
        heads = (intercept.head_of(model, params, student.features), taught)
        blind = student._replace(logits=jnp.full((), jnp.nan))
        fused = objectives.weighted_sum(aim, Signals(blind, teacher, labels, masks, {}, heads), counts)
        return jnp.stack([dense[0], fused[0]]), (dense, fused)

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def graded(params: Any) -> Any:
        """One program for both, so that the model is compiled once."""
        _, pull, values = jax.vjp(both, params, has_aux=True)
        return values, [pull(of)[0] for of in jnp.eye(2)]

    (dense, fused), (theirs, ours) = graded(params)
    assert_near(fused, dense, tolerance=2e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(theirs))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=optim.path_name(path))
