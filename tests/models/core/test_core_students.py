"""Students cut out of models whose layers differ in kind: each layer keeps its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusal import refused

from jaxdistill.models import layer_drop
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model
from jaxdistill.models.student import cut_student, student_config

# Teacher, and the layers of a student: windows, ropes and layers without rope among those that are kept.
CUTS = {
    "gemma3_text": ({"num_hidden_layers": 6, "layer_types": None, "sliding_window_pattern": 3}, (1, 2, 5)),
    "smollm3": ({"num_hidden_layers": 4, "no_rope_layers": (1, 1, 0, 1)}, (1, 2)),
    "olmo3": ({"num_hidden_layers": 4, "layer_types": None}, (0, 3)),
    "modernbert": ({"num_hidden_layers": 6, "global_attn_every_n_layers": 2}, (0, 1, 4, 5)),
}


def teacher_of(kind):
    fields, layers = CUTS[kind]
    return tiny.model(kind, **fields), tiny.params(kind, **fields), layers


def test_lists_by_layer_are_cut_with_the_layers():
    teacher = build_model(tiny.config("gemma3_text", **CUTS["gemma3_text"][0])).config
    cut = student_config(teacher, family="gemma3_text", layers=(1, 2, 5))
    assert cut.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    deeper = student_config(teacher, family="gemma3_text", overrides={"num_hidden_layers": 8})
    assert deeper.layer_types == teacher.layer_types + ["sliding_attention"] * 2
    smollm3 = build_model(tiny.config("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1])).config
    assert student_config(smollm3, family="smollm3", layers=(1, 2)).no_rope_layers == [1, 0]


@pytest.mark.parametrize(
    ("layers", "every"), [((0, 1, 2, 9, 10, 11), 3), ((0, 3, 6), 1), ((0, 1, 2, 4), 4), ((0, 1, 3, 5), 2), ((0,), 1)]
)
def test_modernbert_keeps_a_cadence(layers, every):
    teacher = tiny.config("modernbert", num_hidden_layers=12, global_attn_every_n_layers=3)
    student = build_model(student_config(teacher, family="modernbert", layers=layers))
    windows = [kind.reach for kind in build_model(teacher).core.layers]
    assert student.config.global_attn_every_n_layers == every
    assert [kind.reach for kind in student.core.layers] == [windows[i] for i in layers]


@pytest.mark.parametrize("layers", [(1, 2, 3), (0, 2, 3, 6), (0, 3, 4, 5)])
def test_modernbert_without_a_cadence_is_refused(layers):
    teacher = tiny.config("modernbert", num_hidden_layers=12, global_attn_every_n_layers=3)
    refused(
        lambda: student_config(teacher, family="modernbert", layers=layers),
        f"layers: {list(layers)}",
        "whole periods of 3, such as 0,1,2,9,10,11",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", CUTS)
def test_a_sub_network_is_the_student_that_is_cut_out(kind):
    teacher, params, layers = teacher_of(kind)
    student = build_model(student_config(teacher.config, family=kind, layers=layers))
    cut = cut_student(params, teacher=teacher, student=student, layers=layers)
    ids, mask = (jnp.asarray(x) for x in tiny.batch(kind, length=12))

    @jax.jit
    def both(params, cut):
        kept = jnp.asarray(layer_drop.kept_mask(layers, of=teacher.num_layers))
        dropped = (layer_drop.keep_layers(teacher.family, kept),)
        part = apply(teacher, params, Inputs(ids, mask), interceptors=dropped).logits
        return part, apply(student, cut, Inputs(ids, mask)).logits

    part, alone = both(params, cut)
    np.testing.assert_allclose(part[mask], alone[mask], rtol=1e-5, atol=1e-5)
