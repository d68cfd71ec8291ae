"""What we compute is what PyTorch computes: logits, hidden states, attention, and every parameter's gradient."""

import functools
import json

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxdistill.errors import UserError
from jaxdistill.models import hub, torch_names, weights
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model, count_params
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer

CASES = grids.covering(tiny.INSTALLED, (True, False))
CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]


def torch_class(model):
    return getattr(transformers, model.torch_class)


def torch_inputs(kind, ids, mask):
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    if kind in CAUSAL:  # as generate() gives them: padding on the left has no position
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return inputs


def write(folder, model, tensors):
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def torch_model(folder, model):
    return torch_class(model).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)


@pytest.mark.parametrize(("kind", "tie"), tiny.families(CASES))
def test_names_round_trip_bitwise(kind, tie):
    params = tiny.params(kind, tie_word_embeddings=tie)
    back = torch_names.from_torch(torch_names.to_torch(params), params)
    flat, flat_back = flatten_dict(params), flatten_dict(back)
    assert flat.keys() == flat_back.keys()
    assert all(np.array_equal(flat[path], flat_back[path]) for path in flat)


@pytest.mark.parametrize(
    ("kind", "tie"),
    tiny.families(
        [*((kind, True) for kind in FAMILIES), *((kind, False) for kind in ("bert", "distilbert", "gpt2", "llama"))]
    ),
)
def test_our_weights_in_torch(kind, tie, tmp_path):
    model, params = tiny.model(kind, tie_word_embeddings=tie), tiny.params(kind, tie_word_embeddings=tie)
    write(tmp_path, model, torch_names.to_torch(params))
    theirs, info = torch_model(tmp_path, model)
    assert not any(info.values()), info

    ids, mask = tiny.batch(kind)
    weights = np.random.default_rng(2).normal(size=(*ids.shape, model.vocab_size)).astype(np.float32)
    weights *= mask[:, :, None]

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def ours(params):
        def loss(params):
            out = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)))
            return jnp.sum(jax.nn.log_softmax(out.logits) * weights) / mask.sum(), out.logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = ours(params)
    out = theirs(**torch_inputs(kind, ids, mask))
    ((torch.log_softmax(out.logits, -1) * torch.tensor(weights)).sum() / mask.sum()).backward()
    np.testing.assert_allclose(logits[mask], out.logits.detach().numpy()[mask], atol=1e-4)
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    got = torch_names.to_torch(grads)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        np.testing.assert_allclose(got[name], grad, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tie"), tiny.families(CASES))
def test_torch_weights_in_ours(kind, tie, tmp_path):
    """A folder torch saved, in several shards; hidden states and attention maps too."""
    model = tiny.model(kind, tie_word_embeddings=tie)
    torch.manual_seed(0)
    theirs = torch_class(model)(model.config).eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params = weights.load_params(tmp_path, model)
    ids, mask = tiny.batch(kind)
    got = apply(
        model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)), asked=Asked(hidden_states=True, attentions=True)
    )
    with torch.no_grad():
        out = theirs(
            **torch_inputs(kind, ids, mask),
            output_hidden_states=True,
            output_attentions=True,
        )
    np.testing.assert_allclose(got.logits[mask], out.logits.numpy()[mask], atol=1e-4)
    assert got.hidden_states is not None and got.attentions is not None
    assert len(got.hidden_states) == model.num_layers + 1
    for ours, other in zip(got.hidden_states, out.hidden_states, strict=True):
        np.testing.assert_allclose(ours[mask], other.numpy()[mask], atol=1e-4)
    for ours, other in zip(got.attentions, out.attentions, strict=True):
        # Rows of real queries: what a padded query attends to is undefined, and differs by implementation.
        np.testing.assert_allclose(
            ours.transpose(0, 2, 1, 3)[mask], other.numpy().transpose(0, 2, 1, 3)[mask], atol=1e-4
        )


@pytest.mark.parametrize("kind", tiny.families(FAMILIES))
def test_same_tensors_as_torch_saves(kind, tmp_path):
    for tie in (True, False):
        model = tiny.model(kind, tie_word_embeddings=tie)
        torch_class(model)(model.config).save_pretrained(tmp_path / str(tie))
        with safe_open(tmp_path / str(tie) / "model.safetensors", "np") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
        ours = torch_names.to_torch(tiny.params(kind, tie_word_embeddings=tie))
        assert {name: array.shape for name, array in ours.items()} == shapes


def test_causal_buffers_and_no_prefix(tmp_path):
    """GPT-2 as it stands on the hub: saved without "transformer.", the causal masks in it."""
    model, params = tiny.model("gpt2"), tiny.params("gpt2")
    tensors = {name.removeprefix("transformer."): array for name, array in torch_names.to_torch(params).items()}
    extra = {"h.0.attn.bias": np.ones((1, 1, 20, 20), np.float32), "h.1.attn.masked_bias": np.float32([-1e4])}
    head = {"lm_head.weight": np.zeros((101, 16), np.float32)}  # tied: what stands here does not count, as in torch
    write(tmp_path, model, tensors | extra | head)
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, model), params)
    # A tensor of a layer that config.json does not have is no buffer.
    write(tmp_path, model, tensors | {"h.2.attn.c_attn.bias": np.ones(48, np.float32)})
    with pytest.raises(UserError, match=r"h\.2\.attn\.c_attn\.bias.*do not belong together"):
        weights.load_params(tmp_path, model)


OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 12}
VARIANTS = [
    ("opt", OPT_350M),  # norms after the blocks, embeddings narrower than the layers
    ("opt", {"_remove_final_layer_norm": True}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 1}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),  # torch goes by hidden_act
    ("gemma", {"attention_bias": True}),
    ("gpt2", {"n_inner": None}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), tiny.families(VARIANTS))
def test_variants_of_causal_families(kind, fields, tmp_path):
    """Settings of published models that take another path through the Flax class, or through torch's."""
    model, params = tiny.model(kind, **fields), tiny.params(kind, **fields)
    write(tmp_path, model, torch_names.to_torch(params))
    theirs, info = torch_model(tmp_path, model)
    assert not any(info.values()), info
    ids, mask = tiny.batch(kind)
    got = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)), asked=Asked(hidden_states=True))
    with torch.no_grad():
        out = theirs(**torch_inputs(kind, ids, mask), output_hidden_states=True)
    np.testing.assert_allclose(got.logits[mask], out.logits.numpy()[mask], atol=1e-4)
    for ours, other in zip(got.hidden_states, out.hidden_states, strict=True):
        np.testing.assert_allclose(ours[mask], other.numpy()[mask], atol=1e-4)


def test_old_names_and_no_prefix(tmp_path):
    """LayerNorm.gamma/beta, and an encoder saved without "bert."."""
    model, params = tiny.model("bert"), tiny.params("bert")
    renamed = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in torch_names.to_torch(params).items()
    }
    extra = {"embeddings.position_ids": np.arange(20)[None], "pooler.dense.bias": np.ones(16, np.float32)}
    write(tmp_path, model, renamed | extra | {"cls.seq_relationship.bias": np.ones(2, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, model), params)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bert", torch.float16), ("bert", torch.bfloat16), ("llama", torch.bfloat16)]
)
def test_half_precision_is_upcast_exactly(kind, dtype, tmp_path):
    model = tiny.model(kind)
    theirs = torch_class(model)(model.config).to(dtype)
    theirs.save_pretrained(tmp_path)
    got = torch_names.to_torch(weights.load_params(tmp_path, model))
    for name, array in got.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs.state_dict()[name].float().numpy())


def test_pickles_only_when_allowed(tmp_path):
    model, params = tiny.model("bert"), tiny.params("bert")
    model.config.save_pretrained(tmp_path)
    state = {name: torch.tensor(array) for name, array in torch_names.to_torch(params).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"is a pickle.*--allow-pickle"):
        weights.load_params(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, model, allow_pickle=True), params)


def test_pickles_run_no_code(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    model = tiny.model("bert")
    torch.save({"bert.x": Touch()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be read as tensors: .* could run code"):
        weights.load_params(tmp_path, model, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_sinusoidal_distilbert_reads_its_stored_table(tmp_path):
    """DistilBERT's own checkpoints say sinusoidal_pos_embds: true and hold learned positions."""
    model, params = tiny.model("distilbert"), tiny.params("distilbert")
    write(tmp_path, model, torch_names.to_torch(params))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "sinusoidal_pos_embds": True}))
    read = build_model(hub.load_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, read), params)


@pytest.mark.slow
def test_real_weights(shared):
    folder = shared / "models" / "minilm-l6-mlm"
    model = build_model(hub.load_config(folder))
    params = weights.load_params(folder, model)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config)
    text = ["The European [MASK] voted on the proposal.", "I declare resumed the session."]
    encoded = tokenizer(text, return_tensors="np", padding=True)
    ids, mask = encoded["input_ids"], encoded["attention_mask"].astype(bool)
    got = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)))
    place = list(ids[0]).index(tokenizer.mask_token_id)
    best = np.argsort(-np.asarray(got.logits[0, place]))[:3]
    assert tokenizer.convert_ids_to_tokens(best) == ["commission", "parliament", "council"]
    theirs = torch_class(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(encoded["attention_mask"]))
    np.testing.assert_allclose(got.logits[mask], out.logits.numpy()[mask], atol=1e-4)
    assert count_params(params) == sum(array.size for array in load_file(folder / "model.safetensors").values())


@pytest.mark.slow
def test_real_causal_weights(shared):
    folder = shared / "models" / "stories260k-llama"
    model = build_model(hub.load_config(folder))
    params = weights.load_params(folder, model)
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(["Once upon a time, there was a little girl", "Tom"])["input_ids"]
    width = max(map(len, encoded))
    ids = np.array([[0] * (width - len(row)) + row for row in encoded], np.int32)
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in encoded])
    got = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)))
    theirs = torch_class(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(**torch_inputs("llama", ids, mask))
    np.testing.assert_allclose(got.logits[mask], out.logits.numpy()[mask], atol=1e-4, rtol=1e-4)
    assert count_params(params) == sum(array.size for array in load_file(folder / "model.safetensors").values())
