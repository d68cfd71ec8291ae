"""The sum of terms on made-up signals: which tokens, which layers, which weights. No model runs here."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.losses import divergences, layers
from jaxdistill.losses import policy as policies
from jaxdistill.losses import terms as objectives
from jaxdistill.losses.divergences import DIVERGENCES
from jaxdistill.losses.layers import projection_name
from jaxdistill.losses.objective import Ramp, at_step, init_projections
from jaxdistill.losses.relations import relation_kl, vectors
from jaxdistill.losses.settings import LossConfig
from jaxdistill.losses.term import Objective, Relation, Signals
from jaxdistill.losses.terms import TERMS
from jaxdistill.models.core.modules import Projected
from jaxdistill.models.intercept import Outputs

ROWS, LENGTH, VOCAB, WIDTHS, LAYERS, HEADS = 2, 6, 7, (4, 5), (2, 3), (2, 3)
LAYER_MAP = ((0, 0), (1, 2), (2, 3))
RNG = np.random.default_rng(0)


def outputs(rng: np.random.Generator, *, width: int, layers: int, heads: int) -> Outputs:
    maps = rng.random((layers, ROWS, heads, LENGTH, LENGTH), dtype=np.float32) + 0.1
    return Outputs(
        logits=jnp.asarray(rng.normal(size=(ROWS, LENGTH, VOCAB)), jnp.float32),
        hidden_states=tuple(
            jnp.asarray(rng.normal(size=(ROWS, LENGTH, width)), jnp.float32) for _ in range(layers + 1)
        ),
        attentions=tuple(jnp.asarray(m / m.sum(-1, keepdims=True)) for m in maps),
        projected=Projected(*(jnp.asarray(x) for x in rng.normal(size=(3, ROWS, LENGTH, heads, 2)).astype(np.float32))),
    )


STUDENT = outputs(RNG, width=WIDTHS[0], layers=LAYERS[0], heads=HEADS[0])
TEACHER = outputs(RNG, width=WIDTHS[1], layers=LAYERS[1], heads=HEADS[1])
ATTENDED = np.arange(LENGTH) < np.array([6, 3])[:, None]
LABELLED = ATTENDED & np.array([[0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
SAMPLED = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool)
LABELS = np.where(LABELLED | SAMPLED, RNG.integers(0, VOCAB, LABELLED.shape), -100).astype(np.int32)
BATCH = {"attention_mask": ATTENDED, "label_mask": LABELLED, "sampled_mask": SAMPLED}
ROLLOUT = {
    name: jnp.asarray(RNG.normal(size=SAMPLED.shape), jnp.float32) for name in ("advantages", "old_log_q", "log_p")
}
ROLLOUT["weights"] = jnp.asarray(RNG.random(SAMPLED.shape), jnp.float32)
EMBEDDING = jnp.asarray(RNG.normal(size=(VOCAB, 3)), jnp.float32)
POLICY = policies.PolicyConfig(diversity_target=1.5, entropy_target=9.0)
KERNELS = {projection_name(*pair): {"kernel": jnp.asarray(RNG.normal(size=WIDTHS), jnp.float32)} for pair in LAYER_MAP}


def make_objective(weights: Mapping[str, float], tokens: str = "all") -> Objective:
    relation = Relation(layer=0, heads=2, weights=(1.0, 0.5, 0.0))
    return Objective(weights, temperature=2.0, tokens=tokens, layer_map=LAYER_MAP, policy=POLICY, relation=relation)


def make_signals(objective: Objective, **changes: Any) -> Signals:
    head = ATTENDED if objective.tokens == "all" else LABELLED
    masks = {"tokens": ATTENDED, "labels": LABELLED, "head": head, "sampled": SAMPLED}
    signals = Signals(STUDENT, TEACHER, jnp.asarray(LABELS), jax.tree.map(jnp.asarray, masks), KERNELS)
    documents = jnp.asarray(ATTENDED, jnp.int32)
    return signals._replace(sampled=ROLLOUT, embedding=EMBEDDING, documents=documents)._replace(**changes)


def counts_of(objective: Objective) -> dict[str, jax.Array]:
    return objectives.token_counts(objectives.masks_of(objective, jax.tree.map(jnp.asarray, BATCH)))


def means_of(objective: Objective, signals: Signals) -> dict[str, float]:
    means = objectives.weighted_sum(objective, signals, counts_of(objective))[1]
    return {name: float(mean) for name, mean in means.items()}


ALL = dict.fromkeys(TERMS, 1.0)


def by_hand(tokens: str) -> dict[str, float]:
    """Every mean, token by token over a list of tokens, from the losses of single tokens."""
    attended = [tuple(i) for i in np.argwhere(ATTENDED)]
    labelled = [tuple(i) for i in np.argwhere(LABELLED)]
    head = attended if tokens == "all" else labelled
    mean = lambda values: float(np.mean(np.asarray([np.asarray(v) for v in values], np.float64)))  # noqa: E731

    def hidden(loss: Any, pairs: Any) -> float:
        project = lambda s, t: STUDENT.hidden_states[s] @ KERNELS[f"{s}>{t}"]["kernel"]  # noqa: E731
        return mean(loss(project(s, t)[i], TEACHER.hidden_states[t][i]) for s, t in pairs for i in attended)

    def attention(s: int, t: int, row: int, query: int) -> float:
        a, b = (m[row, :, query].mean(0) for m in (STUDENT.attentions[s - 1], TEACHER.attentions[t - 1]))
        real = ATTENDED[row]
        return float((b * jnp.log(b / a))[real].sum())

    documents = jnp.asarray(ATTENDED, jnp.int32)
    sides = [vectors(model.projected) for model in (STUDENT, TEACHER) if model.projected]
    relations = [relation_kl(sides[0][i], sides[1][i], documents, heads=2) for i in range(2)]

    sampled = lambda values: float(np.asarray(values)[SAMPLED].mean())  # noqa: E731
    mask = jnp.asarray(SAMPLED)
    return {
        "policy": sampled(
            policies.policy_loss(
                STUDENT.logits,
                TEACHER.logits,
                jnp.asarray(LABELS),
                mask,
                advantages=ROLLOUT["advantages"],
                old_log_q=ROLLOUT["old_log_q"],
                weights=ROLLOUT["weights"],
                settings=policies.PolicyConfig(),
            )
        ),
        "repetition": sampled(policies.repetition_penalty(STUDENT.logits, jnp.asarray(LABELS), mask)),
        "diversity": sampled(policies.diversity_penalty(STUDENT.logits, mask, embedding=EMBEDDING, target=1.5)),
        "entropy": sampled(policies.entropy_penalty(STUDENT.logits, mask, target=9.0)),
        "ce": mean(divergences.forward_kl(STUDENT.logits[i], TEACHER.logits[i], temperature=2.0) for i in head),
        "mlm": mean(-jax.nn.log_softmax(STUDENT.logits[i])[LABELS[i]] for i in labelled),
        "clm": mean(-jax.nn.log_softmax(STUDENT.logits[i])[LABELS[i]] for i in labelled),
        "mse": mean(divergences.logit_mse(STUDENT.logits[i], TEACHER.logits[i]) for i in head),
        "cos": hidden(layers.cosine_distance, LAYER_MAP[-1:]),
        "hidden_mse": hidden(layers.hidden_mse, LAYER_MAP),
        "hidden_cos": hidden(layers.cosine_distance, LAYER_MAP),
        "attention": mean(attention(s, t, *i) for s, t in LAYER_MAP[1:] for i in attended),
        "relation": mean(relations[0][i] + 0.5 * relations[1][i] for i in attended),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["all", "masked", "labels"])
def test_every_mean_by_hand(tokens: str) -> None:
    objective = make_objective(ALL, tokens)
    means = means_of(objective, make_signals(objective))
    assert means == pytest.approx(by_hand(tokens), rel=1e-5)


def test_every_loss_has_a_weight_in_the_config_and_every_weight_a_loss() -> None:
    knobs = {name for name in LossConfig.model_fields if name.startswith("alpha_")}
    assert knobs == {f"alpha_{name}" for name in TERMS}
    assert LossConfig().weights == {name: term.weight for name, term in TERMS.items()}
    assert {k: v for k, v in LossConfig().weights.items() if v} == {"ce": 5.0, "mlm": 2.0, "clm": 2.0, "cos": 1.0}


def test_rows_say_one_way_in_which_a_loss_is_computed() -> None:
    for name, term in TERMS.items():
        assert (term.per_token is None) != (term.on_logits is None), name
        assert (term.on_logits is not None) == (term.sees == "logits"), name


def test_every_divergence_is_a_choice_of_the_config_and_is_what_ce_weighs() -> None:
    for name, divergence in DIVERGENCES.items():
        assert LossConfig(divergence=name).divergence == name
        objective = make_objective({"ce": 1.0})._replace(divergence=name, beta=0.3)
        values = divergence.value(STUDENT.logits, TEACHER.logits, 2.0, 0.3)
        mean = means_of(objective, make_signals(objective))["ce"]
        assert mean == pytest.approx(float(np.asarray(values)[ATTENDED].mean()), rel=1e-5), name


weights = st.dictionaries(st.sampled_from(sorted(TERMS)), st.floats(0.01, 10), min_size=1)


@given(weights)
@settings(max_examples=20, deadline=None)
def test_total_is_the_weighted_sum_of_the_terms_that_are_on(weights: dict[str, float]) -> None:
    objective = make_objective(weights)
    total, means = objectives.weighted_sum(objective, make_signals(objective), counts_of(objective))
    assert means.keys() == weights.keys()
    assert total.dtype == jnp.float32 and total.shape == ()
    assert float(total) == pytest.approx(sum(w * float(means[k]) for k, w in weights.items()), rel=1e-5)


def test_what_is_off_is_not_looked_at() -> None:
    bare: Any = STUDENT._replace(hidden_states=None, attentions=None)
    mlm = make_objective({"mlm": 1.0})
    assert np.isfinite(means_of(mlm, make_signals(mlm, student=bare, teacher=None))["mlm"])
    assert not objectives.needs_hidden_states(mlm) and not objectives.needs_attentions(mlm)
    for name in ("cos", "hidden_mse", "hidden_cos"):
        assert objectives.needs_hidden_states(make_objective({name: 1.0}))
    assert objectives.needs_attentions(make_objective({"attention": 1.0}))


@functools.cache
def gradient_of_all(tokens: str) -> Any:
    """Jitted (student, teacher, labels) -> (loss, its gradient in the student's outputs), of all losses together."""
    objective = make_objective(ALL, tokens)

    def loss(student: Outputs, teacher: Outputs, labels: jax.Array) -> jax.Array:
        signals = make_signals(objective, student=student, teacher=teacher, labels=labels)
        return objectives.weighted_sum(objective, signals, counts_of(objective))[0]

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("tokens", [pytest.param("all", marks=pytest.mark.slow), "masked"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_masked_out_positions_enter_neither_loss_nor_gradient(tokens: str, seed: int) -> None:
    """Teacher and student hold anything where there is padding, and labels where nothing is labelled."""
    rng = np.random.default_rng(seed)
    padded = jnp.asarray(~ATTENDED)

    def disturb(x: jax.Array, axis: int) -> jax.Array:
        shape = [1] * x.ndim
        shape[0], shape[axis] = padded.shape
        junk = 1e3 * jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        return jnp.where(padded.reshape(shape), junk, x)

    def disturbed(model: Outputs) -> Outputs:
        return Outputs(
            disturb(model.logits, 1),
            tuple(disturb(h, 1) for h in model.hidden_states),
            tuple(disturb(disturb(a, 2), 3) for a in model.attentions),
            projected=model.projected and Projected(*(disturb(x, 1) for x in model.projected)),
        )

    labels = jnp.where(LABELLED | SAMPLED, LABELS, jnp.asarray(rng.integers(-100, VOCAB, LABELS.shape)))
    graded = gradient_of_all(tokens)
    clean, clean_gradient = graded(STUDENT, TEACHER, jnp.asarray(LABELS))
    dirty, dirty_gradient = graded(disturbed(STUDENT), disturbed(TEACHER), labels)
    np.testing.assert_array_equal(clean, dirty)
    jax.tree.map(np.testing.assert_array_equal, clean_gradient, dirty_gradient)


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_an_empty_mask_gives_zero(tokens: str) -> None:
    objective = make_objective(ALL, tokens)
    nothing = jnp.zeros_like(ATTENDED)
    counts = objectives.token_counts(objectives.masks_of(objective, dict.fromkeys(BATCH, nothing)))
    signals = make_signals(objective, masks=dict.fromkeys(("tokens", "labels", "head", "sampled"), nothing))
    total, means = objectives.weighted_sum(objective, signals, counts)
    assert float(total) == 0 and all(float(mean) == 0 for mean in means.values())


def test_counts() -> None:
    counts = counts_of(make_objective(ALL))
    assert {k: float(v) for k, v in counts.items()} == {"tokens": 9, "labels": 3, "head": 9, "sampled": 5}
    assert float(counts_of(make_objective(ALL, "masked"))["head"]) == 3


@pytest.mark.slow
def test_shares_of_micro_batches_add_up_to_the_mean_of_the_whole() -> None:
    """Rows of unlike length: a mean of means would not."""
    objective = make_objective(ALL)
    signals = make_signals(objective)
    whole = means_of(objective, signals)
    shares = []
    for row in range(ROWS):
        rows = lambda x, row=row: x[row : row + 1]  # noqa: E731
        part = signals._replace(
            student=jax.tree.map(rows, STUDENT),
            teacher=jax.tree.map(rows, TEACHER),
            labels=rows(signals.labels),
            masks=jax.tree.map(rows, signals.masks),
            sampled=jax.tree.map(rows, ROLLOUT),
            documents=rows(jnp.asarray(ATTENDED, jnp.int32)),
        )
        shares.append(means_of(objective, part))
    assert {k: sum(share[k] for share in shares) for k in whole} == pytest.approx(whole, rel=1e-5)


def test_rows_that_a_model_wrote_bring_their_own_mask_of_the_head() -> None:
    own = jax.tree.map(jnp.asarray, {**BATCH, "head_mask": SAMPLED, "text_mask": LABELLED})
    for tokens in ("all", "labels"):
        masks = objectives.masks_of(make_objective(ALL, tokens), own)
        np.testing.assert_array_equal(masks["head"], SAMPLED)
        np.testing.assert_array_equal(masks["tokens"], LABELLED)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.25), ("cosine", (1 - np.cos(np.pi / 4)) / 2)])
def test_a_ramp_goes_from_start_to_end(shape: str, half: float) -> None:
    """Temperature 2 -> 1 and the weight of clm 3 -> 0 over 9 steps; what is not named stays."""
    aim = make_objective({"ce": 5.0, "clm": 3.0})
    ramp = Ramp({"temperature": 1.0, "clm": 0.0}, shape, steps=9)
    for step, done in ((0, 0.0), (2, half), (8, 1.0), (20, 1.0)):
        now = at_step(aim, ramp, jnp.int32(step))
        assert float(now.temperature) == pytest.approx(2 - done)
        assert {k: float(v) for k, v in now.weights.items()} == pytest.approx({"ce": 5.0, "clm": 3 - 3 * done})


def test_projections_stand_where_widths_differ() -> None:
    sizes = {"student_width": 4, "teacher_width": 5, "num_layers": LAYERS, "key": jax.random.key(0)}
    made = lambda weights, **changes: init_projections(  # noqa: E731
        make_objective(weights), **{**sizes, **changes}
    )
    assert made(ALL, teacher_width=4) == {}
    assert set(made({"cos": 1.0})) == {"2>3"}
    assert set(made({"hidden_mse": 1.0})) == set(made({"hidden_cos": 1.0})) == {"0>0", "1>2", "2>3"}
    assert made({"ce": 1.0, "attention": 1.0}) == {}
    kernels = [x["kernel"] for x in made(ALL).values()]
    assert all(kernel.shape == (4, 5) and kernel.dtype == jnp.float32 for kernel in kernels)
    assert not np.array_equal(kernels[0], kernels[1])


def test_projections_get_a_gradient() -> None:
    objective = make_objective({"cos": 1.0, "hidden_mse": 1.0})

    def loss(kernels: Any) -> jax.Array:
        signals = make_signals(objective, projections=kernels)
        return objectives.weighted_sum(objective, signals, counts_of(objective))[0]

    for name, gradient in jax.grad(loss)(KERNELS).items():
        assert np.abs(gradient["kernel"]).max() > 1e-3, name
