"""Attention by jax's kernel is that of the classes, by value and gradient, and leaves alone what it cannot do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill.errors import UserError
from jaxdistill.models import intercept
from jaxdistill.models.flax import attention
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.model import build_model, build_model_for, init_params, without_attention_dropout
from jaxdistill.models.settings import StudentConfig

MASKED = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
CAUSAL = ("gpt2", "gpt_neo", "opt", "llama", "mistral", "gemma")
KINDS = MASKED + CAUSAL


def run(
    kind: str, implementation: str, params: Any, *, dropout: bool = True, attentions: bool = False, **inputs: Any
) -> intercept.Outputs:
    model = build_model(tiny.model(kind).config, attention=implementation)
    model = model if dropout else without_attention_dropout(model)
    ids, mask = tiny.batch(kind)
    rows = Inputs(jnp.asarray(ids), jnp.asarray(mask), **inputs)
    return intercept.apply(model, params, rows, asked=Asked(hidden_states=True, attentions=attentions))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were asked for, one a layer."""
    made: list[str] = []
    kernel = jax.nn.dot_product_attention

    def seen(*args: Any, **kwargs: Any) -> jax.Array:
        made.append(kwargs["implementation"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", seen)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.families(KINDS, fast=(), weekly=True))
def test_value_and_gradient_are_those_of_the_class(kind: str, calls: list[str]) -> None:
    """At the real tokens: what stands at padding is nobody's."""
    _, mask = tiny.batch(kind)
    assert not mask.all()

    def number(params: Any, implementation: str) -> tuple[jax.Array, Any]:
        outputs = run(kind, implementation, params)
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(outputs.logits), 0.0)), outputs.logits

    graded = jax.value_and_grad(number, has_aux=True)
    ((own, own_logits), own_gradient), made = graded(tiny.params(kind), ""), list(calls)
    ((ours, logits), gradient) = graded(tiny.params(kind), "xla")
    assert made == [] and calls == ["xla"] * tiny.model(kind).num_layers
    np.testing.assert_allclose(logits[mask], own_logits[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, own, rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(own_gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), gradient, own_gradient)


@pytest.mark.slow
def test_maps_and_dropout_are_the_class_s_own(calls: list[str]) -> None:
    params = tiny.params("bert")
    maps = run("bert", "xla", params, attentions=True).attentions
    assert len(maps) == 2 and calls == []
    noisy = run("bert", "xla", params, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(noisy.logits, run("bert", "", params, dropout_key=jax.random.key(0)).logits)
    assert calls == []


@pytest.mark.parametrize("kind", tiny.families(CAUSAL, weekly=True))
@pytest.mark.slow
def test_packed_documents(kind: str, calls: list[str]) -> None:
    """A token sees those of its own document alone, and counts its position from its beginning."""
    ids, mask = tiny.batch(kind)
    half = np.broadcast_to(np.arange(ids.shape[1]) >= ids.shape[1] // 2, ids.shape).astype(np.int32)
    params, segments = tiny.params(kind), {"segment_ids": jnp.asarray(half)}
    ours, own = (run(kind, implementation, params, **segments).logits for implementation in ("xla", ""))
    assert calls == ["xla"] * tiny.model(kind).num_layers
    np.testing.assert_allclose(ours[mask], own[mask], rtol=1e-5, atol=1e-5)
    second = mask & (half == 1)
    assert not np.allclose(ours[second], run(kind, "xla", params).logits[second], atol=1e-3)


@pytest.mark.parametrize("kind", tiny.families(["bert", "distilbert", "gpt2", "opt"]))
def test_training_without_dropout_on_the_maps(kind: str, calls: list[str]) -> None:
    """The rest of the dropout draws what it draws in the class."""
    settings = {"dropout": False, "dropout_key": jax.random.key(0)}
    ours, own = (run(kind, implementation, tiny.params(kind), **settings).logits for implementation in ("xla", ""))
    assert calls == ["xla"] * tiny.model(kind).num_layers
    _, mask = tiny.batch(kind)
    np.testing.assert_allclose(ours[mask], own[mask], rtol=1e-5, atol=1e-5)
    assert not np.allclose(ours[mask], run(kind, "", tiny.params(kind)).logits[mask], atol=1e-3)


SIZES = {"bert": {"hidden_size": 32}, "distilbert": {"dim": 32}, "gpt2": {"n_embd": 32}, "gemma": {"head_dim": 8}}


@pytest.mark.parametrize("kind", tiny.families(SIZES))
def test_cudnn_s_kernels_take_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for a GPU, which checks shapes and types, with one of its kernels a layer forward and one backward."""
    from jax._src.cudnn import fused_attention_stablehlo  # which asks for the version that is installed here

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)
    model = build_model(tiny.config(kind, **SIZES[kind]), dtype=jnp.bfloat16, attention="cudnn")
    ids, mask = map(jnp.asarray, tiny.batch(kind))

    def number(params: Any) -> jax.Array:
        return jnp.sum(intercept.apply(model, params, Inputs(ids, mask)).logits.astype(jnp.float32))

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    kernels = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    lowered = jax.export.export(jax.jit(jax.grad(number)), platforms=["cuda"], disabled_checks=allowed)(params)
    text = lowered.mlir_module()
    assert [text.count(f"@{name}(") for name in kernels] == [model.num_layers] * 2


@pytest.mark.parametrize("size", [12, 264])
def test_heads_that_cudnn_does_not_take(size: int) -> None:
    settings = StudentConfig(attention="cudnn", dtype="bfloat16")
    with pytest.raises(UserError, match=f"multiple of 8 up to 256 entries.* have {size};"):
        build_model_for(tiny.config("bert", hidden_size=2 * size), settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["albert"])
def test_other_classes_run_as_they_are(kind: str, calls: list[str]) -> None:
    ours, own = (run(kind, implementation, tiny.params(kind)).logits for implementation in ("xla", ""))
    np.testing.assert_array_equal(ours, own)
    assert calls == []


@pytest.mark.parametrize("name", attention.CLASSES)
def test_every_class_is_one_of_transformers(name: str) -> None:
    families = [kind.replace("-", "_") for kind in KINDS]
    modules = [__import__(f"transformers.models.{x}.modeling_flax_{x}", fromlist=["x"]) for x in families]
    assert sum(hasattr(module, name) for module in modules) == 1
