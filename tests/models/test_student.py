"""Students cut from teachers: their configuration and numbers, and what is refused."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jaxdistill.errors import UserError
from jaxdistill.models.config_fields import head_size
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model
from jaxdistill.models.student import cut_student, student_config


@pytest.mark.parametrize("kind", tiny.families((kind for kind in FAMILIES if kind != "albert"), fast=("bert",)))
def test_selected_layers_are_the_teachers_bit_for_bit(kind):
    depth = tiny.depth(kind, 3)
    teacher, params = tiny.model(kind, **depth), tiny.params(kind, **depth)
    student = build_model(student_config(teacher.config, family=kind, layers=(0, 2)))
    assert teacher.num_layers == 3 and student.num_layers == 2
    cut = flatten_dict(cut_student(params, teacher=teacher, student=student, layers=(0, 2)), sep="/")
    source = flatten_dict(params, sep="/")
    prefix = teacher.family.layers
    for path, array in cut.items():
        old = path.replace(prefix.format(1) + "/", prefix.format(2) + "/")
        np.testing.assert_array_equal(array, source[old])
    assert len(cut) == len(source) - sum(path.startswith(prefix.format(2) + "/") for path in source)


@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_distilbert_with_every_layer_is_its_bert_teacher(tie):
    """Token types folded, head copied: nothing of the teacher is lost, so the logits are the teacher's."""
    what = {"tie_word_embeddings": tie, "num_hidden_layers": 3, "layer_norm_eps": 1e-12}
    teacher, params = tiny.model("bert", **what), tiny.params("bert", **what)
    student = build_model(student_config(teacher.config, family="distilbert", layers=(0, 1, 2)))
    cut = cut_student(params, teacher=teacher, student=student, layers=(0, 1, 2))
    ids, mask = (jnp.asarray(array) for array in tiny.batch("bert"))
    full = apply(teacher, params, Inputs(ids, mask), asked=Asked(hidden_states=True))
    half = apply(student, cut, Inputs(ids, mask), asked=Asked(hidden_states=True))
    assert full.hidden_states is not None and half.hidden_states is not None
    np.testing.assert_allclose(full.hidden_states[0], half.hidden_states[0], atol=1e-6)
    np.testing.assert_allclose(full.logits[mask], half.logits[mask], atol=1e-5)


@pytest.mark.slow
def test_gpt_neo_layers_keep_their_kind_of_attention():
    """Layers 0 and 2 of local, global, local, global are both local; the config file says so too."""
    depth = tiny.depth("gpt_neo", 4)
    teacher, params = tiny.model("gpt_neo", **depth), tiny.params("gpt_neo", **depth)
    assert teacher.config.attention_layers == ["local", "global", "local", "global"]
    config = student_config(teacher.config, family="gpt_neo", layers=(0, 2))
    for kept in (config, type(config).from_dict(config.to_dict())):
        assert (kept.num_layers, kept.attention_layers) == (2, ["local", "local"])
    # The first two layers are the same computation in both, when layer 1 is the one that is kept.
    config = student_config(teacher.config, family="gpt_neo", layers=(0, 1))
    student = build_model(config)
    cut = cut_student(params, teacher=teacher, student=student, layers=(0, 1))
    ids, mask = (jnp.asarray(array) for array in tiny.batch("gpt_neo"))
    full = apply(teacher, params, Inputs(ids, mask), asked=Asked(hidden_states=True)).hidden_states
    half = apply(student, cut, Inputs(ids, mask), asked=Asked(hidden_states=True)).hidden_states
    np.testing.assert_allclose(half[1], full[1], atol=1e-6)
    # A student of other sizes says which attention its layers have.
    random = {"num_layers": 3, "attention_types": [[["local"], 3]]}
    assert student_config(teacher.config, family="gpt_neo", overrides=random).attention_layers == ["local"] * 3
    with pytest.raises(UserError, match="attention_types names 4 layers, num_layers is 3"):
        build_model(student_config(teacher.config, family="gpt_neo", overrides={"num_layers": 3}))


def test_reference_init_drops_token_types_and_draws_the_head():
    what = {"num_hidden_layers": 3, "layer_norm_eps": 1e-12}
    teacher, params = tiny.model("bert", **what), tiny.params("bert", **what)
    student = build_model(student_config(teacher.config, family="distilbert", layers=(0, 2)))
    ours, theirs = (
        flatten_dict(
            cut_student(
                params,
                teacher=teacher,
                student=student,
                layers=(0, 2),
                reference_init=reference,
                key=jax.random.key(0),
            ),
            sep="/",
        )
        for reference in (False, True)
    )
    differ = {path for path in ours if not np.array_equal(ours[path], theirs[path])}
    positions = "distilbert/embeddings/position_embeddings/embedding"
    head = {f"vocab_{name}" for name in ("transform/kernel", "transform/bias", "layer_norm/scale", "layer_norm/bias")}
    assert differ == {positions} | head
    embeddings = params["bert"]["embeddings"]
    np.testing.assert_array_equal(theirs[positions], embeddings["position_embeddings"]["embedding"])
    np.testing.assert_array_equal(theirs["vocab_projector/bias"], params["cls"]["predictions"]["bias"])


@pytest.mark.slow
def test_albert_keeps_its_groups():
    """4 layers in 2 shared groups. Layers 0, 2, 3 run groups 0, 1, 1, but 3 layers in 2 groups run 0, 0, 1."""
    teacher, params = tiny.model("albert"), tiny.params("albert")
    groups = params["albert"]["encoder"]["albert_layer_groups"]
    for layers, kept in (
        ((0, 2), ("0", "1")),
        ((2, 3), ("1",)),
        ((0, 1, 2), ("0", "1")),
        ((0, 1, 2, 3), ("0", "1")),
    ):
        student = build_model(student_config(teacher.config, family="albert", layers=layers))
        cut = cut_student(params, teacher=teacher, student=student, layers=layers)
        assert student.num_layers == len(layers)
        got = cut["albert"]["encoder"]["albert_layer_groups"]
        assert len(got) == len(kept)
        for new, old in enumerate(kept):
            jax.tree.map(np.testing.assert_array_equal, got[str(new)], groups[old])
    with pytest.raises(UserError, match="equally many layers of each group"):
        student_config(teacher.config, family="albert", layers=(0, 2, 3))


@pytest.mark.slow
def test_albert_cut_runs_the_chosen_layers():
    teacher, params = tiny.model("albert"), tiny.params("albert")
    student = build_model(student_config(teacher.config, family="albert", layers=(0, 1)))
    cut = cut_student(params, teacher=teacher, student=student, layers=(0, 1))
    ids, mask = (jnp.asarray(array) for array in tiny.batch("albert"))
    full = apply(teacher, params, Inputs(ids, mask), asked=Asked(hidden_states=True)).hidden_states
    half = apply(student, cut, Inputs(ids, mask), asked=Asked(hidden_states=True)).hidden_states
    assert full is not None and half is not None
    for left, right in zip(half, full, strict=False):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_student_config_fields():
    bert = tiny.config("bert", layer_norm_eps=1e-12, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    config = student_config(bert, family="distilbert", layers=(0,))
    expected = {
        "n_layers": 1,
        "dim": 16,
        "hidden_dim": 24,
        "n_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 20,
        "activation": "gelu_new",
        "dropout": 0.3,
        "attention_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "pad_token_id": 0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    narrow = student_config(bert, family="bert", overrides={"hidden_size": 8, "num_hidden_layers": 1})
    assert (narrow.hidden_size, narrow.num_hidden_layers, bert.hidden_size) == (8, 1, 16)


def test_what_a_student_cannot_be():
    bert = tiny.config("bert")
    with pytest.raises(UserError, match=r"no field 'hiden_size'; did you mean 'hidden_size'"):
        student_config(bert, family="bert", overrides={"hiden_size": 8})
    with pytest.raises(UserError, match=r"hidden_size='8' is a str; the teacher's is 16"):
        student_config(bert, family="bert", overrides={"hidden_size": "8"})
    with pytest.raises(UserError, match=r"eps 1e-12, the teacher's 0.001"):
        student_config(bert, family="distilbert", layers=(0,))
    with pytest.raises(UserError, match=r"'distilbert' from a roberta teacher"):
        student_config(tiny.config("roberta"), family="distilbert", layers=(0,))
    narrow = build_model(student_config(bert, family="bert", layers=(0,), overrides={"intermediate_size": 8}))
    with pytest.raises(UserError, match=r"intermediate/dense/bias is \(8,\) in the student and \(24,\)"):
        cut_student(tiny.params("bert"), teacher=tiny.model("bert"), student=narrow, layers=(0,))
    with pytest.raises(UserError, match="electra student cannot be cut from a bert teacher"):
        electra = build_model(tiny.config("electra"))
        cut_student(tiny.params("bert"), teacher=tiny.model("bert"), student=electra, layers=(0, 1))


@pytest.mark.parametrize(
    ("kind", "family", "overrides", "fits"),
    [
        # Sixteen wide with two heads: heads stay eight wide, and the inner size keeps its share of the width.
        ("bert", "bert", {"hidden_size": 9}, {"num_attention_heads": 1, "intermediate_size": 13}),
        ("bert", "bert", {"hidden_size": 25, "num_hidden_layers": 1}, {"num_attention_heads": 1}),
        ("bert", "distilbert", {"hidden_size": 27}, {"num_attention_heads": 3, "hidden_dim": 40}),
        ("bert", "distilbert", {"dim": 27}, {"num_attention_heads": 3}),
        ("gpt2", "gpt2", {"n_embd": 33}, {"num_attention_heads": 3}),
        ("llama", "llama", {"hidden_size": 40, "num_attention_heads": 3}, {"num_attention_heads": 10}),
    ],
)
def test_a_width_that_heads_do_not_divide_is_refused_with_sizes_that_fit(kind, family, overrides, fits):
    teacher = tiny.config(kind)
    with pytest.raises(UserError, match=r"is not divisible by .* it is config\.student\.overrides=") as caught:
        student_config(teacher, family=family, overrides=overrides)
    said = ast.literal_eval(str(caught.value).partition("config.student.overrides=")[2])
    assert said.items() >= {**overrides, **fits}.items()
    build_model(student_config(teacher, family=family, overrides=said))  # what is said can be given


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma"])
def test_the_size_of_a_head_follows_a_new_width(kind):
    """LlamaConfig derives head_dim when it is made; Gemma's heads have a size of their own."""
    teacher = tiny.config(kind)
    width, heads = 2 * teacher.hidden_size, teacher.num_attention_heads
    student = build_model(student_config(teacher, family=kind, overrides={"hidden_size": width}))
    old = teacher.head_dim or teacher.hidden_size // heads
    assert head_size(student.config) == (old if kind == "gemma" else width // heads)
