"""A student's folder opens in PyTorch, and nothing is left of one that would not."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import torch
from tiny import random_params

from jaxdistill.errors import UserError
from jaxdistill.export import proof
from jaxdistill.export.card import Card, Results, model_card
from jaxdistill.export.export import export
from jaxdistill.export.origin import Origin, Source
from jaxdistill.models import hub, stored, torch_names, weights
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model
from jaxdistill.step import sharding

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "of", "france", "."]
TEACHER = Source(name="user/teacher", licence={"license": "mit"}, base_models=("user/teacher",))
CARD = model_card(
    Card(
        name="student",
        origin=Origin(how="distilled", teacher=TEACHER, is_cut=True, layers=(0, 2)),
        recipe={"steps": 3},
        results=Results({"ppl": 4.25, "kl": 0.5, "teacher_ppl": 3.75}, 20, "at most 8 rows of `held.txt`"),
        step=30,
    )
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizerFast

    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return BertTokenizerFast(str(file))


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def student(request):
    from transformers import AutoConfig

    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 12}
    if request.param == "bert":
        sizes |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    else:
        sizes |= {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    model = build_model(AutoConfig.for_model(request.param, **sizes))
    return model, random_params(model, np.random.default_rng(0), 0.3)


@pytest.fixture
def arguments(student, tokenizer):
    probe = tokenizer(["Paris is the [MASK] of France.", "the capital"], return_tensors="np", padding=True)
    probe = {name: probe[name] for name in ("input_ids", "attention_mask")}
    return {"model": student[0], "params": student[1], "tokenizer": tokenizer, "card": CARD, "probe": probe}


def nothing_but(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_the_folder_opens_in_torch(arguments, tmp_path):
    from safetensors.numpy import save_file
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    out = tmp_path / "runs" / "student"
    export(**arguments, out=out, to="pytorch")
    nothing_but(out.parent, "student")
    assert (out / "README.md").read_text() == CARD
    theirs, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()) and theirs.dtype == torch.float32
    probe = arguments["probe"]
    ours = apply(
        arguments["model"],
        arguments["params"],
        Inputs(jnp.asarray(probe["input_ids"]), jnp.asarray(probe["attention_mask"], bool)),
    ).logits
    with torch.no_grad():
        got = theirs.eval()(**{name: torch.tensor(array) for name, array in probe.items()}).logits.numpy()
    mask = probe["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[mask], ours[mask], atol=1e-4)
    # As a user would: DistilBERT refuses token types, so its tokenizer must not make any.
    tokenizer = AutoTokenizer.from_pretrained(out)
    answers = pipeline("fill-mask", model=str(out))("Paris is the [MASK] of France.")
    place = list(probe["input_ids"][0]).index(tokenizer.mask_token_id)
    assert [answer["token"] for answer in answers] == list(np.argsort(-np.asarray(ours[0, place]))[:5])
    assert tokenizer.model_max_length == 12
    # Tensor by tensor, and yet the bytes of the library.
    save_file(torch_names.to_torch(arguments["params"]), tmp_path / "theirs", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.slow
def test_a_model_for_which_one_device_has_no_room(tokenizer, tmp_path, monkeypatch):
    """It is read from its files onto all devices of the process, each of which holds a part."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = AutoConfig.for_model("bert", **sizes, vocab_size=len(WORDS), max_position_embeddings=12)
    model = build_model(config)
    ids = np.array([[2, 5, 6, 4, 10, 3]])
    common = {"model": model, "tokenizer": tokenizer, "card": CARD, "to": "pytorch"}
    common["probe"] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    export(**common, params=random_params(model, np.random.default_rng(0), 0.02), out=tmp_path / "whole")
    shares, place = [], stored.placed

    def placed(*arguments):
        params = place(*arguments)
        shares.append(tiny_run.largest_share(params))
        return params

    monkeypatch.setattr(sharding, "_ROOM", 0)
    monkeypatch.setattr(stored, "placed", placed)
    export(**common, params=weights.open_params(tmp_path / "whole", model), out=tmp_path / "split")
    whole, split = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "split"))
    assert whole == split and len(shares) == 2 and max(shares) < 0.2


def test_flax_folder_reads_back(arguments, tmp_path):
    export(**arguments, out=tmp_path / "out", to="flax")
    assert {"flax_model.msgpack", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    back = weights.load_params(tmp_path / "out", build_model(hub.load_config(tmp_path / "out")))
    jax.tree.map(np.testing.assert_array_equal, back, arguments["params"])
    whole = (tmp_path / "out" / "flax_model.msgpack").read_bytes()
    (tmp_path / "out" / "flax_model.msgpack").write_bytes(whole[:-7])
    with pytest.raises(UserError, match="truncated or damaged"):
        weights.load_params(tmp_path / "out", arguments["model"])


@pytest.mark.slow
def test_flax_class_opens_the_flax_folder(arguments, tmp_path):
    from transformers import FlaxAutoModelForMaskedLM

    export(**arguments, out=tmp_path / "out", to="flax")
    with jax.numpy_rank_promotion("allow"):
        theirs = FlaxAutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, theirs.params, arguments["params"])


def test_nothing_is_written_over(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export(**arguments, out=tmp_path / "out", to="pytorch")
    nothing_but(tmp_path / "out", "mine.txt")
    with pytest.raises(UserError, match="exists"):
        export(**arguments, out=tmp_path / "out" / "mine.txt", to="pytorch")
    (tmp_path / "empty").mkdir()
    export(**arguments, out=tmp_path / "empty", to="pytorch")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_folder_that_reads_back_differently_is_not_left(arguments, tmp_path, monkeypatch):
    def wrong(leaf):
        # Square kernels not transposed: the usual way to get a conversion wrong, invisible in the shapes.
        return leaf.T if leaf.ndim == 2 and len(set(leaf.shape)) == 1 else leaf

    monkeypatch.setattr(stored, "whole", wrong)
    with pytest.raises(UserError, match="logits up to"):
        export(**arguments, out=tmp_path / "out", to="pytorch")
    nothing_but(tmp_path)


def test_parameters_that_are_not_finite_are_refused(arguments, tmp_path):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), arguments["params"])
    with pytest.raises(UserError, match="NaN"):
        export(**{**arguments, "params": broken}, out=tmp_path / "out", to="pytorch")
    nothing_but(tmp_path)


@pytest.mark.parametrize("to", ["pytorch", "flax"])
def test_disk_full(arguments, tmp_path, monkeypatch, to):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        if to == "flax":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    writer = "jaxdistill.models.stored.whole" if to == "pytorch" else "pathlib.Path.write_bytes"
    monkeypatch.setattr(writer, full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        export(**arguments, out=tmp_path / "out", to=to)
    nothing_but(tmp_path)


def test_a_folder_that_cannot_be_made(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export(**arguments, out=tmp_path / "file" / "out", to="pytorch")


def test_other_errors_are_not_hidden(arguments, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(proof, "apply", bug)
    with pytest.raises(ZeroDivisionError):
        export(**arguments, out=tmp_path / "out", to="pytorch")
    nothing_but(tmp_path)


def test_model_card():
    from huggingface_hub import ModelCard

    head = ModelCard(CARD).data.to_dict()
    assert head.get("license") == "mit" and head.get("base_model") == "user/teacher"
    assert head.get("pipeline_tag") == "fill-mask" and head.get("library_name") == "transformers"
    assert head.get("tags") == ["jaxdistill", "distillation", "knowledge-distillation"]
    assert "A masked language model distilled from `user/teacher`, starting at layers 0, 2 of `user/teacher`" in CARD
    assert ", in 30 updates. It was made with" in CARD and "After 20 updates, on at most 8 rows of `held.txt`:" in CARD
    assert "| metric | value | teacher |" in CARD and "| ppl | 4.25 | 3.75 |" in CARD and "| kl | 0.5 |  |" in CARD
    assert '"steps": 3' in CARD and "The licence of `user/teacher` is mit" in CARD


LOCAL = Source(name="/home/me/bert", licence={"license": "other", "license_name": "own: 1"}, base_models=("user/bert",))
UNKNOWN = Source(name="./start")


@pytest.mark.parametrize(
    ("origin", "sentence", "licence", "bases"),
    [
        (Origin(how="trained"), "trained from scratch", None, None),
        (Origin(how="fine-tuned", start=TEACHER), "fine-tuned from `user/teacher`", "mit", "user/teacher"),
        (
            Origin(how="fine-tuned", teacher=LOCAL, is_cut=True, layers=(1,)),
            "fine-tuned from layer 1 of `bert`", "other", "user/bert",
        ),
        (
            Origin(how="cut", teacher=LOCAL, is_cut=True, layers=(0, 3)),
            "cut from `bert` (layers 0, 3) and not trained", "other", "user/bert",
        ),
        (
            Origin(how="distilled", teacher=TEACHER, start=LOCAL),
            "distilled from `user/teacher`, starting at `bert`", None, ["user/teacher", "user/bert"],
        ),
        (
            Origin(how="distilled", teacher=TEACHER, start=TEACHER),
            "distilled from `user/teacher`, starting at `user/teacher`", "mit", "user/teacher",
        ),
        (
            Origin(how="distilled", teacher=TEACHER, start=UNKNOWN),
            "distilled from `user/teacher`, starting at `./start`", None, "user/teacher",
        ),
        (
            Origin(how="distilled", teacher=TEACHER),
            "distilled from `user/teacher`, starting at random parameters", "mit", "user/teacher",
        ),
    ],
)  # fmt: skip
def test_a_card_says_what_the_model_was_made_from(origin, sentence, licence, bases):
    from huggingface_hub import ModelCard

    for given in ("", "bsd-3-clause"):
        text = model_card(Card(name="s", origin=origin, recipe={}, license=given, causal=True))
        head = ModelCard(text).data.to_dict()
        assert f"A causal language model {sentence}. It was made with jaxdistill." in text
        assert head.get("license") == (given or licence) and head.get("base_model") == bases
        assert head.get("pipeline_tag") == "text-generation" and "The model was not evaluated." in text
        assert ("distillation" in head["tags"]) == (origin.how == "distilled")
        names = [Path(one.name).name if one is LOCAL else one.name for one in origin.sources]
        assert all(f"The licence of `{name}`" in text for name in names)
        assert "fill" not in text and "/home" not in text
    if origin.sources == [LOCAL]:
        assert (
            ModelCard(model_card(Card(name="s", origin=origin, recipe={}))).data.to_dict()["license_name"] == "own: 1"
        )


def test_a_card_names_no_folder_of_the_user():
    private = {"teacher": {"name": "/home/me/bert"}, "data": {"path": "~/text.txt", "cache_dir": "/home/me/.cache"}}
    card = model_card(Card(name="s", origin=Origin(how="distilled", teacher=LOCAL, start=LOCAL), recipe=private))
    assert "/home" not in card and "~" not in card and "`bert`" in card and "text.txt" in card


def test_an_export_asks_for_no_code_of_the_teachers_folder(arguments, tmp_path):
    import copy

    asks = {"AutoModelForMaskedLM": "own.Own", "AutoTokenizer": [None, "own.Own"]}
    config, tokenizer = copy.deepcopy(arguments["model"].config), copy.deepcopy(arguments["tokenizer"])
    config.auto_map, tokenizer.init_kwargs["auto_map"] = asks, asks
    export(**{**arguments, "model": build_model(config), "tokenizer": tokenizer}, out=tmp_path / "out", to="pytorch")
    assert [path.name for path in (tmp_path / "out").iterdir() if "auto_map" in path.read_text("latin-1")] == []
    assert config.auto_map == tokenizer.init_kwargs["auto_map"] == asks


def export_causal(tmp_path, tokenizer, **fields):
    import tiny

    model = build_model(tiny.config("gpt2", vocab_size=len(WORDS), **fields))
    ids = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), bool)}
    params = random_params(model, np.random.default_rng(0), 0.02)
    export(model=model, params=params, tokenizer=tokenizer, out=tmp_path / "out", to="pytorch", card="", probe=ids)
    return hub.load_config(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (11, 11),
        pytest.param([11, 3], [11, 3], marks=pytest.mark.slow),
        pytest.param([11, 99], 11, marks=pytest.mark.slow),
        pytest.param(50256, 3, marks=pytest.mark.slow),
        (None, 3),  # 3 is [SEP], as there is no eos
    ],
)
def test_an_export_of_a_causal_model_says_what_ends_its_texts(tokenizer, tmp_path, given, written):
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = export_causal(tmp_path, tokenizer, eos_token_id=given, bos_token_id=50256, pad_token_id=50256)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert theirs is not None
    for one in (config, generation, theirs):
        assert (one.bos_token_id, one.eos_token_id, one.pad_token_id) == (None, written, 0)
