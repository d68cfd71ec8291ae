"""Whole runs of models that the core computes: stopped and run again, evaluated, exported, and opened in torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_causal
import tiny_run
import torch
import transformers

from jaxdistill import cli, train
from jaxdistill.models import hub, weights
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model

pytestmark = pytest.mark.slow

# Every loss of hidden states and maps, LayerDrop, rematerialisation, micro-batches and a split of the parameters.
VARIED = {
    "train__steps": 4,
    "train__accumulation": 2,
    "mesh__fsdp": 2,
    "student__layer_drop": 0.3,
    "student__remat": "dots",
    "loss__alpha_hidden_mse": 1.0,
    "loss__alpha_attention": 1.0,
    "checkpoint__every": 1,
}
CAUSAL = {"sample__student": 0.5, "loss__tokens": "labels"}
MODERN = {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0}


def tiny_qwen3(folder):
    return tiny_causal.make(folder, kind="qwen3", head_dim=6, num_key_value_heads=1, rope_theta=500.0)


def tiny_gemma2(folder):
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    return tiny_causal.make(folder, kind="gemma2", head_dim=8, num_key_value_heads=1, sliding_window=6, **caps)


def tiny_modernbert(folder):
    tiny = tiny_run.make(folder)
    tokenizer = tiny_run.make_tokenizer(tiny_run.lines(200))
    tiny_run.write_model(tiny.teacher, tokenizer, kind="modernbert", **MODERN)
    return tiny


@pytest.mark.parametrize(
    ("make", "values"),
    [
        # A decoder goes through the same in test_newest, and through stops with text of its own in test_causal_runs; a
        # masked run of the core is stopped and goes on in test_flax_then_core.
        pytest.param(tiny_qwen3, CAUSAL, marks=pytest.mark.weekly, id="qwen3"),
        pytest.param(tiny_gemma2, CAUSAL, marks=pytest.mark.weekly, id="gemma2"),
        pytest.param(
            tiny_modernbert,
            {"student__layers": "[0,1,2,3]", "train__batch_size": 32},
            marks=pytest.mark.weekly,
            id="modernbert",
        ),
    ],
)
def test_a_whole_run(make, values, tmp_path, monkeypatch):
    tiny = make(tmp_path)
    values = {**VARIED, **values}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tiny_run.train(tiny, whole, **values)
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 2)
        train.main(tiny_run.arguments(tiny, stopped, **values))
    tiny_run.train(tiny, stopped, **values)
    tiny_run.assert_same_run(stopped, whole)

    code, out, _ = tiny_run.call(cli.main, ["evaluate", f"--workdir={whole}", "--metrics=perplexity,agreement"])
    assert code == 0 and "perplexity" in out
    folder = tmp_path / "exported"
    code, _, err = tiny_run.call(cli.main, ["export", "--to-pytorch", f"--workdir={whole}", f"--out={folder}"])
    assert code == 0, err
    probe = json.loads((whole / "probe.json").read_text())
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        theirs = model(**{name: torch.tensor(np.array(x)).long() for name, x in probe.items()}).logits.numpy()
    ours = build_model(hub.load_config(folder))
    inputs = {
        "input_ids": jnp.asarray(probe["input_ids"]),
        "attention_mask": jnp.asarray(probe["attention_mask"], bool),
    }
    got = np.asarray(apply(ours, weights.load_params(folder, ours), Inputs(**inputs)).logits)
    mask = np.asarray(probe["attention_mask"], bool)
    np.testing.assert_allclose(got[mask], theirs[mask], atol=1e-4)
