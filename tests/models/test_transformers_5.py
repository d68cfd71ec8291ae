"""Configurations of transformers 4.57 and of 5 are read alike, and exports can be read by both."""

import json

import pytest

from jaxdistill.models import hub, transformers_5
from jaxdistill.models.core.rows import read_settings

pytestmark = pytest.mark.newest

SIZES = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def rope(theta, stretch=None, **more):
    return {"rope_theta": theta, **(stretch or {"rope_type": "default"}), **more}


def by_kind(full, sliding):
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# Model type, what transformers 5 writes of its ropes and windows, and the fields of 4.57 that mean the same.
SPELLINGS = [
    ("llama", {"rope_parameters": rope(500.0)}, {"rope_theta": 500.0, "rope_scaling": None}),
    ("llama", {"rope_parameters": rope(500.0, LLAMA3)}, {"rope_theta": 500.0, "rope_scaling": LLAMA3}),
    (
        "phi3",
        {"rope_parameters": rope(500.0, partial_rotary_factor=0.5)},
        {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    (
        "gemma3_text",
        by_kind(rope(900.0, YARN), rope(300.0)),
        {"rope_theta": 900.0, "rope_local_base_freq": 300.0, "rope_scaling": YARN},
    ),
    ("olmo3", by_kind(rope(900.0, YARN), rope(900.0)), {"rope_theta": 900.0, "rope_scaling": YARN}),
    (
        "modernbert",
        {**by_kind(rope(900.0), rope(300.0)), "layer_types": ["full_attention", "sliding_attention"] * 2},
        {
            "global_rope_theta": 900.0,
            "local_rope_theta": 300.0,
            "rope_scaling": None,
            "global_attn_every_n_layers": 2,
        },
    ),
]


@pytest.mark.parametrize(("kind", "new", "old"), SPELLINGS)
def test_the_words_of_4_for_what_5_writes(kind, new, old):
    fields = {"model_type": kind, **new}
    assert transformers_5.fields_of_4(fields) == old
    both = transformers_5.in_both_spellings(fields)
    assert both == {**fields, **{name: value for name, value in old.items() if value is not None}}
    assert transformers_5.in_both_spellings(both) == both
    assert transformers_5.fields_of_4({"model_type": kind, **old}) == {}


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        ("olmo3", by_kind(rope(900.0), rope(300.0))),  # 4.57 has one theta
        ("gemma3_text", by_kind(rope(900.0), rope(300.0, YARN))),  # and stretches the layers that see everything
        ("modernbert", by_kind(rope(900.0, YARN), rope(300.0))),  # or all
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"] * 2}),  # the first sees everything
        ("bert", {}),
    ],
)
def test_what_4_has_no_words_for_stays_as_it_is(kind, new):
    assert transformers_5.in_both_spellings({"model_type": kind, **new}) == {"model_type": kind, **new}


@pytest.mark.parametrize(("kind", "new", "old"), [row for row in SPELLINGS if row[0] != "modernbert"])
def test_both_spellings_are_the_same_model(tmp_path, kind, new, old):
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5, "head_dim": 8}
    sizes = {**SIZES, **(more if kind in ("gemma3_text", "olmo3") else {}), "model_type": kind}
    if kind == "olmo3":
        sizes.pop("head_dim")
    both = transformers_5.in_both_spellings({**sizes, **old})
    read = []
    for fields in ({**sizes, **new}, {**sizes, **old}, {**sizes, **old, **new}, both):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        read.append(read_settings(hub.load_config(tmp_path)))
    assert read[1:] == read[:1] * 3
    assert {layer.rope.theta for layer in read[0].layers} & {500.0, 900.0}
