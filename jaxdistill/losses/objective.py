"""From the settings of the losses to the objective of a pair of models."""

from collections.abc import Sequence

from jaxdistill.errors import UserError
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.losses.settings import LossConfig
from jaxdistill.losses.terms import BY_LAYER, ON_HIDDEN, ON_SAMPLES, Objective, Ramp
from jaxdistill.models.pair import Pair


def make_objective(loss: LossConfig, policy: PolicyConfig, pair: Pair) -> Objective:
    """The losses that are enabled, for these two models.

    Raises:
      UserError: no loss is left, or the layer map names a layer that is not there.
    """
    weights = loss.enabled(teacher=pair.teacher is not None)
    causal = pair.student.family.causal
    weights.pop("mlm" if causal else "clm", None)
    if not weights:
        raise UserError(f"no loss is enabled: set config.loss.alpha_{'clm' if causal else 'mlm'}, or another")
    for role, model in (("student", pair.student), ("teacher", pair.teacher)):
        narrow = model and getattr(model.config, "word_embed_proj_dim", model.width) != model.width
        if narrow and any(name in weights for name in ON_HIDDEN):
            raise UserError(f"the {role}'s last hidden states are projected (OPT-350m): set the losses on them to 0")
    layer_map: tuple[tuple[int, int], ...] = ()
    if any(name in weights for name in BY_LAYER):
        layer_map = _layer_map(loss.layer_map, pair)
        if "attention" in weights and not any(s > 0 and t > 0 for s, t in layer_map):
            raise UserError("config.loss.layer_map holds only embeddings (-1), which have no attention to transfer")
    return Objective(
        weights=weights,
        temperature=loss.temperature,
        tokens=loss.tokens,
        layer_map=layer_map,
        divergence=loss.divergence,
        beta=loss.beta,
        head=loss.head,
        policy=policy if any(name in weights for name in ON_SAMPLES) else None,
    )


def make_ramp(loss: LossConfig, objective: Objective, *, steps: int) -> Ramp | None:
    """How temperature and weights move over `steps` steps; None where they stay.

    Weights of losses that are off are ignored.
    """
    ends = {name: value for name, value in loss.ends.items() if name == "temperature" or name in objective.weights}
    return Ramp(ends, loss.ramp, steps) if ends else None


def _layer_map(pairs: Sequence[Sequence[int]] | None, models: Pair) -> tuple[tuple[int, int], ...]:
    """((student, teacher), ...) counted from 0, -1 = embeddings, to indexes into hidden_states."""
    assert models.teacher is not None
    sizes = models.student.num_layers, models.teacher.num_layers
    if pairs is None:
        # The layers that were cut out, or evenly spread ones that end with the last (TinyBERT's uniform map).
        taught = models.layers or [(i + 1) * sizes[1] // sizes[0] - 1 for i in range(sizes[0])]
        pairs = list(enumerate(taught))
    result = []
    for pair in pairs:
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(i, int) for i in pair)
        if not fits or not all(-1 <= i < n for i, n in zip(pair, sizes, strict=True)):
            raise UserError(
                f"config.loss.layer_map holds {pair!r}; it must be (student layer, teacher layer), with layers "
                f"-1 to {sizes[0] - 1} and -1 to {sizes[1] - 1}"
            )
        result.append((pair[0] + 1, pair[1] + 1))
    return tuple(result)
