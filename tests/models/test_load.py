"""Names, configurations, tokenizers, weights: what is read, and one clear line for what cannot be."""

import json
import logging

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxdistill.errors import UserError
from jaxdistill.models import hub, torch_names, weights
from jaxdistill.models.model import build_model, count_params, init_params, param_shapes
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer

CAUSAL = ("gpt2", "gpt_neo", "opt", "llama", "mistral", "gemma")


@pytest.fixture
def folder(tmp_path):
    model = tiny.model("bert")
    model.config.save_pretrained(tmp_path)
    save_file(torch_names.to_torch(tiny.params("bert")), tmp_path / "model.safetensors")
    return tmp_path


def change(folder, change_tensors):
    tensors = dict(torch_names.to_torch(tiny.params("bert")))
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_local_folder_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(lambda: hub.resolve(str(file)), "model.safetensors is a file", "folder")
    refused(lambda: hub.resolve(str(tmp_path / "none")), "none: there is no such folder")
    refused(lambda: hub.resolve("./none"), "./none: there is no such folder")
    refused(lambda: hub.resolve(""), "is empty")
    refused(lambda: hub.resolve("nobody/nothing", revision="v1"), "nobody/nothing at revision v1", "network")
    refused(lambda: hub.resolve("not a name!"), "not a name!", "check the name")
    refused(lambda: hub.load_config(tmp_path), "has no config.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["model_type None"]),
        (
            '{"model_type": "t5"}',
            ["model_type 't5'", "bert, roberta, xlm-roberta, distilbert, electra, albert, gpt2, gpt_neo, opt"],
        ),
    ],
)
def test_bad_config_json(tmp_path, text, parts):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: hub.load_config(tmp_path), *parts)


def test_code_in_a_folder_is_not_run(tmp_path):
    fields = {**tiny.config("bert").to_dict(), "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert type(hub.load_config(tmp_path)).__name__ == "BertConfig"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"hidden_size": 15}, "hidden size 15 is not divisible by 2 heads"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "activation 'mish' is none of gelu"),
    ],
)
def test_configurations_the_class_cannot_follow(fields, part):
    refused(lambda: build_model(tiny.config("bert", **fields)), part)


@pytest.mark.parametrize(
    ("kind", "fields", "part"),
    [
        ("gpt2", {"n_embd": 15}, "hidden size 15 is not divisible by 2 heads"),
        ("gpt2", {"activation_function": "mish"}, "activation 'mish'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("opt", {"enable_bias": False}, "enable_bias is False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"head_dim": 8}, "head_dim is 8"),
        ("llama", {"num_key_value_heads": 3}, "4 heads are not divisible by 3 key/value heads"),
        ("llama", {"rope_theta": 5e5}, "type 'default' with theta 500000"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "with theta 500000"),
        ("llama", {"max_position_embeddings": 7}, "7 positions"),
        ("mistral", {"head_dim": 8}, "head_dim is 8"),
        ("mistral", {"rope_theta": 1e6}, "theta 1e+06"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("gemma", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_configurations_the_causal_class_would_pass_over(kind, fields, part):
    refused(lambda: build_model(tiny.config(kind, **fields)), f"{kind} config: ", part)


def test_build_is_quiet_and_leaves_the_verbosity(caplog):
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity(logging.INFO)
    try:
        with caplog.at_level(logging.INFO, logger="transformers"):
            build_model(tiny.config("bert", vocab_size=77))
        assert hf_logging.get_verbosity() == logging.INFO
        assert not caplog.records
    finally:
        hf_logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("kind", "length"),
    [("bert", 20), ("roberta", 18), ("xlm-roberta", 18), ("albert", 20), *((kind, 20) for kind in CAUSAL)],
)
def test_sizes(kind, length):
    model = tiny.model(kind)
    assert (model.width, model.vocab_size, model.max_length) == (16, 101, length)
    ids = np.full((1, length), 9, np.int32)
    from jaxdistill.models.intercept import apply

    out = apply(
        model,
        tiny.params(kind),
        input_ids=jax.numpy.asarray(ids),
        attention_mask=jax.numpy.ones((1, length), bool),
    )
    assert np.isfinite(out.logits).all()


def test_read_back(folder):
    params = weights.load_params(folder, tiny.model("bert"))
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params("bert"))
    shapes = param_shapes(tiny.model("bert"))
    assert count_params(shapes) == count_params(params) == sum(x.size for x in jax.tree.leaves(params))


def test_missing_tensors(folder, caplog):
    model = tiny.model("bert")
    change(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("cls.")])
    refused(lambda: weights.load_params(folder, model), "lacks 5 of the 42 tensors", "cls.predictions.bias", ", ...")
    with caplog.at_level(logging.WARNING):
        params = weights.load_params(folder, model, missing="init", key=jax.random.key(0))
    assert "drawn at random: cls.predictions.bias" in caplog.text and len(caplog.records) == 1
    flat, source = flatten_dict(params, sep="/"), flatten_dict(tiny.params("bert"), sep="/")
    assert flat.keys() == source.keys()
    for path, array in flat.items():
        assert np.array_equal(array, source[path]) != path.startswith("cls/")


def test_damaged_weights(folder):
    model, file = tiny.model("bert"), folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(lambda: weights.load_params(folder, model), "model.safetensors is truncated or damaged")

    name = "bert.encoder.layer.1.output.dense.weight"
    change(folder, lambda t: t.update({name: t[name][:, :-1].copy()}))
    refused(lambda: weights.load_params(folder, model), name, "(16, 23)", "(16, 24)")
    change(folder, lambda t: t.update({name: np.full_like(t[name], np.nan)}))
    refused(lambda: weights.load_params(folder, model), name, "NaN or infinite")
    change(folder, lambda t: t.update({name.replace(".1.", ".2."): t[name]}))
    refused(
        lambda: weights.load_params(folder, model),
        "layer.2",
        "configuration (2 layers)",
        "do not belong together",
    )
    file.unlink()
    refused(lambda: weights.load_params(folder, model), "holds no weights")


def test_damaged_index_of_shards(folder):
    model, index = tiny.model("bert"), folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        refused(lambda: weights.load_params(folder, model), "is no index of shards")
    for shard in ("model-1.safetensors", "../model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"bert.x": shard}}))
        refused(lambda: weights.load_params(folder, model), "which is not in the folder")


def tokenizer_file(folder, *special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate([*special, "the", "session"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[0] if special else "the"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_bare_tokenizer_json(tmp_path):
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast and (tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        4,
        1,
        7,
    )
    check_tokenizer(tokenizer, tiny.config("bert", vocab_size=7))
    refused(
        lambda: check_tokenizer(tokenizer, tiny.config("bert", vocab_size=6)),
        "largest id is 6",
        "has 6 entries",
    )


def test_no_tokenizer(tmp_path):
    refused(lambda: load_tokenizer(tmp_path), "has no tokenizer")
    tokenizer_file(tmp_path)
    refused(lambda: load_tokenizer(tmp_path), "none of the tokens")
    whole = (tmp_path / "tokenizer.json").read_text()
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
        refused(lambda: load_tokenizer(tmp_path), "no tokenizer that can be read")
        (tmp_path / name).write_text(json.dumps({"model_type": "bert", "tokenizer_class": "BertTokenizer"}))
    (tmp_path / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(tmp_path), "no tokenizer that can be read")


def test_a_tokenizer_saved_by_transformers_5(tmp_path):
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    settings = {"tokenizer_class": "TokenizersBackend", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).mask_token_id == 4


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("bert-base-uncased", "hello world", [101, 7592, 2088, 102]),
        ("roberta-base", "hello world", [0, 42891, 232, 2]),
    ],
)
def test_real_tokenizers(shared, name, text, ids):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id is not None


def test_gemma_begins_where_torch_does():
    """Its norms multiply by 1 + weight: torch begins with 0, the Flax class with 1."""
    norms = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(init_params(tiny.model("gemma"), jax.random.key(0)))
        if "norm" in path[-2].key
    ]
    assert len(norms) == 5 and all(not x.any() for x in norms)
