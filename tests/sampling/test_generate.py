"""Generation: token for token what PyTorch generates; blind to padding and to the rest of the batch; fair draws."""

import copy
import io
import json
import sys
from pathlib import Path

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tiny
import tiny_run
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from jaxdistill import cli
from jaxdistill.errors import UserError
from jaxdistill.export.card import Card, model_card
from jaxdistill.export.export import export
from jaxdistill.export.origin import Origin
from jaxdistill.jobs.generate import writer_named
from jaxdistill.models import hub, weights
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model
from jaxdistill.models.positions import position_ids
from jaxdistill.models.tokenizer import end_ids, load_tokenizer
from jaxdistill.sampling import generate
from jaxdistill.sampling.decoding import Decoding, choose, mix, repeated, truncate
from jaxdistill.sampling.generate import make_decoder, make_generator
from jaxdistill.sampling.write import continue_prompts
from jaxdistill.step.sharding import mesh_of_flags

CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]
QUICK = ("mistral",)  # a window, rotary positions, and a head that the class does not tie
PROMPTS = [[17, 40, 8, 99, 23, 65], [50], [71, 5, 33], [12, 12, 90, 61]]
PAD = 1


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(4, 101))]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@pytest.fixture(scope="session")
def gpt2_folder(tokenizer, tmp_path_factory):
    return written(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", tokenizer)


def params_of(kind, **overrides):
    """tiny's with larger matrices: a model that does not say one word for ever, nor any two with like chances."""
    larger = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, tiny.params(kind, **overrides))
    if kind in ("gemma2", "gemma3_text"):  # they norm what a layer adds, which would drown in their embeddings
        layers = jax.tree.map(lambda x: 20 * x if x.ndim == 1 else x, larger["model"]["layers"])
        return {**larger, "model": {**larger["model"], "layers": layers}}
    return larger


def written(out, kind, tokenizer, to="pytorch", **overrides):
    """The tiny model's folder, as export writes it."""
    ids, mask = tiny.batch(kind)
    export(
        model=tiny.model(kind, **overrides),
        params=params_of(kind, **overrides),
        tokenizer=tokenizer,
        out=out,
        to=to,
        card=model_card(Card(name="tiny", origin=Origin(how="trained"), recipe={})),
        probe={"input_ids": ids, "attention_mask": mask},
    )
    return out


def torch_generate(theirs, prompts, new, end=None):
    """(the new tokens of each prompt, the least lead of a chosen token's logit over the next best)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    theirs.generation_config.eos_token_id = end  # else the config's would end a row
    with torch.no_grad():
        out = theirs.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
    first, second = torch.stack(out.logits).topk(2).values.unbind(-1)
    return out.sequences[:, width:].tolist(), float((first - second).min())


def greedy(model, params, prompts, new, **fields):
    run = make_generator(model, decoding=Decoding(max_new_tokens=new, pad_id=PAD, **fields), batch_size=len(prompts))
    return run(params, prompts, jax.random.key(0))


@pytest.mark.parametrize(
    ("kind", "tie"),
    tiny.families(grids.covering(CAUSAL, (True, False)), fast=(), weekly=True),
)
@pytest.mark.slow
def test_exported_folder_generates_in_torch_what_we_generate(kind, tie, tokenizer, tmp_path):
    model, params = tiny.model(kind, tie_word_embeddings=tie), params_of(kind, tie_word_embeddings=tie)
    folder = written(tmp_path / "out", kind, tokenizer, tie_word_embeddings=tie)
    # Torch's default attention passes over the bound of Gemma 2's scores.
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()) and theirs.config.tie_word_embeddings == tie
    theirs.eval()

    ids, mask = tiny.batch(kind)
    got = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask))).logits
    places = torch.tensor(np.asarray(position_ids(jnp.asarray(mask)))).long()
    with torch.no_grad():
        logits = theirs(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(), position_ids=places
        ).logits.numpy()
    np.testing.assert_allclose(got[mask], logits[mask], rtol=1e-4, atol=1e-4)

    expected, margin = torch_generate(theirs, PROMPTS, 12)
    assert len({token for row in expected for token in row}) > 8  # not one word for ever
    assert margin > 1e-3  # float32 rounding decides nothing
    # The end token: the first row's fifth word, which other rows may or may not say.
    end = expected[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    padded = [row + [PAD] * (max(map(len, expected)) - len(row)) for row in expected]
    assert torch_generate(theirs, PROMPTS, 12, end=end)[0] == padded
    completions = greedy(model, params, PROMPTS, 12, end_ids=(end,))
    assert [list(completion.tokens) for completion in completions] == expected
    assert [completion.stop for completion in completions] == ["end" if end in row else "length" for row in expected]


@pytest.mark.slow
def test_flax_class_opens_the_flax_folder(tokenizer, tmp_path):
    """Tied: FlaxLlama has no tying of its own, and must find a head in the file."""
    from transformers import FlaxAutoModelForCausalLM

    kind = "llama"
    folder = written(tmp_path / "out", kind, tokenizer, to="flax")
    model, params = tiny.model(kind), params_of(kind)
    back = weights.load_params(folder, build_model(hub.load_config(folder)))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    ids = jnp.asarray([PROMPTS[0]])
    with jax.numpy_rank_promotion("allow"):
        theirs = FlaxAutoModelForCausalLM.from_pretrained(folder)(ids).logits
    ours = apply(model, params, Inputs(ids, jnp.ones_like(ids, bool))).logits
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kind", tiny.families(CAUSAL, fast=QUICK, weekly=True))
def test_cached_decoding_is_the_full_forward_at_every_step(kind):
    model, params = tiny.model(kind), tiny.params(kind)
    width, new = 6, 7
    ids = np.random.default_rng(2).integers(5, 101, (2, width + new)).astype(np.int32)
    mask = np.ones_like(ids, bool)
    mask[1, :4] = False
    full = apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask))).logits

    @jax.jit
    def step(cache, tokens, places):
        return generate.forward_cached(
            model, params, input_ids=tokens, attention_mask=jnp.asarray(mask), position_ids=places, cache=cache
        )

    places = position_ids(jnp.asarray(mask))
    cache = generate.empty_cache(model, batch=2, length=width + new)
    logits, cache = step(cache, ids[:, :width], places[:, :width])
    np.testing.assert_allclose(logits, full[:, width - 1], atol=2e-5)
    for at in range(width, width + new):
        logits, cache = step(cache, ids[:, at : at + 1], places[:, at : at + 1])
        np.testing.assert_allclose(logits, full[:, at], atol=2e-5)


@pytest.mark.slow
def test_real_model_is_torch_token_for_token(shared):
    folder = shared / "models" / "stories260k-llama"
    model = build_model(hub.load_config(folder))
    params, words = weights.load_params(folder, model), load_tokenizer(folder)
    prompts = words(["Once upon a time", "Tom and his big dog went to the park. They", "Lily", "The sun"])["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected, _ = torch_generate(theirs, prompts, 80, end=2)
    completions = greedy(model, params, prompts, 80, end_ids=end_ids(model.config, words))
    for row, completion in zip(expected, completions, strict=True):
        assert list(completion.tokens) == row[: len(completion.tokens)]
        assert set(row[len(completion.tokens) :]) <= {PAD}
    assert "little girl named" in words.decode(completions[0].tokens)


@pytest.mark.slow
def test_batch_and_padding_change_no_row():
    """Alone or in company, wherever in the file, greedy or drawn: a prompt and its key give the same text."""
    model, params = tiny.model("gpt2"), params_of("gpt2")
    prompts = [*PROMPTS, [50], list(range(10, 18))]
    for fields in ({}, {"temperature": 1.0, "top_k": 40}):
        decoding = Decoding(max_new_tokens=10, end_ids=(9,), pad_id=PAD, **fields)
        eight, two = (make_generator(model, decoding=decoding, batch_size=size) for size in (8, 2))
        together = eight(params, prompts, jax.random.key(4))
        assert together == two(params, prompts, jax.random.key(4))
        assert together[:1] == two(params, prompts[:1], jax.random.key(4))
        assert together[:2] == eight(params, prompts[:2], jax.random.key(4))
        # The same prompt twice: the same text where nothing is drawn, another where it is.
        assert (together[1] == together[4]) == (not fields)
        if fields:
            assert together != eight(params, prompts, jax.random.key(5))


@pytest.mark.slow
def test_one_compilation_a_width_and_an_early_end(monkeypatch):
    compiled, ran = [], []

    def counted(model, *, batch, length):
        compiled.append((batch, length))
        return empty_cache(model, batch=batch, length=length)

    def forward(*args, **kwargs):
        jax.debug.callback(lambda: ran.append(1))
        return forward_cached(*args, **kwargs)

    empty_cache, forward_cached = generate.empty_cache, generate.forward_cached
    monkeypatch.setattr(generate, "empty_cache", counted)
    monkeypatch.setattr(generate, "forward_cached", forward)
    model, params = tiny.model("gpt2"), params_of("gpt2")
    decoding = Decoding(max_new_tokens=9, pad_id=PAD)
    run = make_generator(model, decoding=decoding, batch_size=2)
    whole = run(params, [*PROMPTS, PROMPTS[0], list(range(10, 19))], jax.random.key(0))
    run(params, PROMPTS, jax.random.key(1))
    assert compiled == [(2, 8 + 8), (2, 11 + 8)]  # 16 would be too wide: 11 prompt tokens and 9 new ones are 20
    jax.effects_barrier()
    assert len(ran) == 5 * 9

    ran.clear()
    end = whole[0].tokens[3]
    decoding = Decoding(max_new_tokens=9, pad_id=PAD, end_ids=(end, whole[1].tokens[0]))
    run = make_generator(model, decoding=decoding, batch_size=2)
    lengths = [len(x.tokens) for x in run(params, PROMPTS[:2], jax.random.key(0))]
    jax.effects_barrier()
    assert max(lengths) <= 4 and len(ran) == max(lengths)  # and not 9


LOGITS = np.array([2.0, -1.0, 0.5, 1.9, 0.0], np.float32)


def oracle(logits, temperature, top_k, top_p):
    """The distribution in float64, token by token, as its definition reads."""
    p = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k or len(p) :]] = 0
    p /= p.sum()
    kept, mass = np.zeros_like(p), 0.0
    for token in order:
        if mass < top_p:
            kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (3.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 0, 0.7),
        (2.0, 4, 0.6),
        (1.0, 1, 1.0),
        (1.0, 0, 0.01),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    draws = 20_000
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = jax.jit(lambda keys: choose(jnp.tile(LOGITS, (draws, 1)), keys, decoding=decoding))(keys)
    counts = np.bincount(np.asarray(tokens), minlength=5)
    expected = oracle(LOGITS, temperature, top_k, top_p)
    assert not counts[expected == 0].any()
    if (expected > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-3
    if (expected > 0).all():  # and the test can tell: these draws do not follow a temperature 10 % off
        other = oracle(LOGITS, 1.1 * temperature, top_k, top_p)
        assert scipy.stats.chisquare(counts, draws * other).pvalue < 1e-3


def test_mixture_is_of_probabilities():
    rng = np.random.default_rng(0)
    for spread, temperature in ((1, 1.0), (10, 0.7), (300, 2.0), (1e4, 1.0)):
        p, q = rng.normal(scale=spread, size=(2, 4, 9)).astype(np.float32)
        expected = 0.2 * scipy.special.softmax(p.astype(float) / temperature, axis=1)
        expected += 0.8 * scipy.special.softmax(q.astype(float) / temperature, axis=1)
        mixed = mix([jnp.asarray(p), jnp.asarray(q)], weights=[0.2, 0.8], temperature=temperature)
        assert np.isfinite(mixed).all()
        np.testing.assert_allclose(jax.nn.softmax(mixed / temperature), expected, rtol=2e-4, atol=1e-7)
    alone = jnp.ones((2, 3))
    assert mix([alone], weights=[1.0], temperature=2.0) is alone


def test_the_mixtures_likeliest_token_and_its_truncation():
    """A compromise that is the first choice of neither, at temperature 0; truncation is that of the mixture."""
    p, q = np.log([[0.5, 0.0001, 0.0999, 0.4]]), np.log([[0.0001, 0.5, 0.0999, 0.4]])
    one = jax.random.split(jax.random.key(0), 1)
    logits = [jnp.float32(p), jnp.float32(q)]
    greedy = mix(logits, weights=[0.5, 0.5], temperature=0.0)
    assert choose(greedy, one, decoding=Decoding()).tolist() == [3]
    mixed = mix(logits, weights=[0.75, 0.25], temperature=1.5)
    expected = scipy.special.softmax(p / 1.5) * 0.75 + scipy.special.softmax(q / 1.5) * 0.25
    draws, keys = 20_000, jax.random.split(jax.random.key(1), 20_000)
    tokens = choose(jnp.tile(mixed, (draws, 1)), keys, decoding=Decoding(temperature=1.5, top_k=2))
    expected = np.where(expected >= np.sort(expected)[:, -2:-1], expected, 0)[0]
    counts = np.bincount(tokens, minlength=4)
    assert not counts[expected == 0].any() and (expected > 0).sum() == 2
    kept = expected[expected > 0] / expected.sum()
    assert scipy.stats.chisquare(counts[expected > 0], draws * kept).pvalue > 1e-3


@given(st.integers(0, 2**31), st.integers(0, 12), st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_truncation_is_transformers(seed, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(3, 10)).astype(np.float32)
    expected = torch.tensor(logits)
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 10))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(truncate(jnp.asarray(logits), top_k=top_k, top_p=top_p), expected.numpy())


@pytest.mark.slow
def test_sampled_sequences_follow_the_model():
    """All 25 sequences of 2 tokens over 5, by the chain rule on full forward passes."""
    draws, sizes = 6000, {"vocab_size": 5, "n_layer": 1}
    model, params = tiny.model("gpt2", **sizes), tiny.params("gpt2", **sizes)

    def probabilities(ids):
        ids = jnp.asarray(ids)
        logits = apply(model, params, Inputs(ids, jnp.ones_like(ids, bool))).logits[:, -1]
        return np.asarray(jax.nn.softmax(logits.astype(float) / 1.5), np.float64)

    first = probabilities([[4, 2]])[0]
    second = probabilities([[4, 2, token] for token in range(5)])
    expected = (first[:, None] * second).ravel()
    decode = make_decoder((model,), weights=(1.0,), decoding=Decoding(max_new_tokens=2, temperature=1.5))
    batch = generate.left_padded([[4, 2]] * draws, rows=draws, width=2, pad_id=0)
    tokens = decode((params,), **batch, keys=jax.random.split(jax.random.key(0), draws)).tokens
    counts = np.bincount(np.asarray(tokens) @ [5, 1], minlength=25)
    assert scipy.stats.chisquare(counts, draws * expected / expected.sum()).pvalue > 1e-3
    assert expected.max() > 3 * expected.min() and expected.min() * draws > 5


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_repetition_is_counted_as_defined(tokens, ngram, times):
    row = np.full((1, 12), 1, np.int32)  # what stands after the end does not count
    row[0, : len(tokens)] = tokens
    last = tokens[-ngram:]
    stand = sum(tokens[i : i + ngram] == last for i in range(len(tokens) - ngram + 1))
    expected = len(tokens) >= ngram and stand >= times
    assert bool(repeated(jnp.asarray(row), len(tokens), ngram=ngram, times=times)[0]) == expected


def test_a_row_that_repeats_itself_ends():
    model, params = tiny.model("gpt2"), tiny.params("gpt2")  # says few words
    whole = greedy(model, params, PROMPTS, 12)
    cut = greedy(model, params, PROMPTS, 12, repeat_ngram=2, repeat_times=3)
    assert {x.stop for x in whole} == {"length"} and "repeats" in {x.stop for x in cut}
    for long, short in zip(whole, cut, strict=True):
        ends = [
            n for n in range(2, 13) if sum(long.tokens[i : i + 2] == long.tokens[n - 2 : n] for i in range(n - 1)) >= 3
        ]
        assert short.tokens == long.tokens[: min(ends, default=12)]
        assert short.stop == ("repeats" if ends else "length")


def run_cli(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def test_command(gpt2_folder, tokenizer, tmp_path, capsys, monkeypatch):
    words = [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "id": 3}) + "\n" for text in words))
    flags = ["--model", gpt2_folder, "--max-new-tokens=8", "--batch-size=3"]
    expected = greedy(tiny.model("gpt2"), params_of("gpt2"), PROMPTS, 8, end_ids=(2,))
    texts = [tokenizer.decode(x.tokens, skip_special_tokens=True) for x in expected]

    assert run_cli(*flags, "--input", tmp_path / "prompts.txt") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == [f"{before} {after}" for before, after in zip(words, texts, strict=True)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(words).encode())))
    assert run_cli(*flags) == 0
    assert capsys.readouterr().out == printed

    out = tmp_path / "new" / "out.jsonl"
    assert run_cli(*flags, "--input", tmp_path / "prompts.jsonl", "--out", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == words
    assert [record["completion"].strip() for record in records] == texts
    assert [(record["tokens"], record["stop"]) for record in records] == [(len(x.tokens), x.stop) for x in expected]
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    assert "4 completions, " in capsys.readouterr().out


@pytest.mark.slow
def test_command_draws_by_seed(gpt2_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("w5\nw6 w7\n")
    drawn = ["--model", gpt2_folder, "--input", tmp_path / "prompts.txt", "--max-new-tokens=8"]
    drawn += ["--temperature=2", "--top-k=50", "--top-p=0.9"]
    texts = []
    for seed in (1, 1, 2):
        assert run_cli(*drawn, f"--seed={seed}") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_command_on_a_mesh(tokenizer, tmp_path, capsys):
    """Devices share the rows and the parameters, and the text is that of one device, drawn or not."""
    sizes = {"n_embd": 128, "n_head": 4, "n_inner": 256}
    folder, prompts = written(tmp_path / "wide", "gpt2", tokenizer, **sizes), tmp_path / "prompts.txt"
    prompts.write_text("".join(" ".join(f"w{i}" for i in prompt) + "\n" for prompt in PROMPTS))
    flags = ["--model", folder, "--input", prompts, "--max-new-tokens=8", "--batch-size=3"]
    writer = writer_named(str(folder), step="last", revision="", allow_pickle=False, report=print)
    for temperature in (0.0, 1.5):
        alone = continue_prompts(
            writer,
            prompts.read_text().splitlines(),
            Decoding(max_new_tokens=8, temperature=temperature),
            batch_size=3,
            seed=0,
        )
        assert run_cli(*flags, f"--temperature={temperature}", "--fsdp=2", "--tensor=2") == 0
        assert capsys.readouterr().out.splitlines() == [one.prompt + one.completion for one in alone]
    mesh = mesh_of_flags(fsdp=2, tensor=2)
    split = writer_named(str(folder), step="last", revision="", allow_pickle=False, report=print, mesh=mesh)
    assert tiny_run.largest_share(writer.load()) == 1 and tiny_run.largest_share(split.load()) < 0.3
    for wrong, said in (
        ("--fsdp=3", "--fsdp 3 x --tensor 1 must divide the 8 devices"),
        ("--tensor=8", "4 heads of the"),
    ):
        assert run_cli(*flags, wrong) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--temperature=-1"], ["temperature is -1", "0"]),
        (["--temperature=nan"], ["temperature is nan"]),
        (["--top-k=5"], ["at temperature 0"]),
        (["--top-k=-1", "--temperature=1"], ["top_k is -1"]),
        (["--top-p=0", "--temperature=1"], ["top_p is 0", "at most 1"]),
        (["--top-p=1.5", "--temperature=1"], ["top_p is 1.5"]),
        (["--max-new-tokens=0"], ["max_new_tokens is 0"]),
        (["--max-new-tokens=20"], ["max_new_tokens is 20", "20 positions"]),
        (["--batch-size=0"], ["batch_size is 0"]),
        (["--stop-repeats", "2", "1"], ["at least 2 times", "2 and 1"]),
        (["--max-new-tokens=17"], ["prompt 2 has 4 tokens", "17 new ones, 1 to 3 fit", "20 positions"]),
        (["--input=none.txt"], ["none.txt cannot be read: No such file"]),
        (["--input=empty.txt"], ["empty.txt holds no prompt"]),
        (["--input=latin.txt"], ["latin.txt is not UTF-8"]),
        (["--input=blank.txt"], ["prompt 2 has 0 tokens"]),
        (["--input=text.jsonl"], ["text.jsonl, line 2 is no JSON object"]),
        (["--input=list.jsonl"], ["list.jsonl, line 1 is no JSON object"]),
        (["--input=number.jsonl"], ["line 1: the prompt is 3, not a text"]),
        (["--out=."], ["--out . is a folder"]),
        (["--model=nowhere/at/all"], ["nowhere/at/all", "no such folder"]),
        (["--model=."], ["has no config.json"]),
    ],
)
def test_bad_input(flags, parts, gpt2_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "prompts.txt": b"w5\nw5 w6 w7 w8\n",
        "empty.txt": b"",
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "blank.txt": b"w5\n\nw6\n",
        "text.jsonl": b'{"prompt": "w5"}\nw6\n',
        "list.jsonl": b'["w5"]\n',
        "number.jsonl": b'{"prompt": 3}\n',
    }.items():
        Path(name).write_bytes(text)
    before = sorted(tmp_path.iterdir())
    assert run_cli("--model", gpt2_folder, "--max-new-tokens=4", "--input=prompts.txt", "--out=out.jsonl", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error, error
    assert sorted(tmp_path.iterdir()) == before


def test_a_masked_model_does_not_generate():
    with pytest.raises(UserError, match="bert is a masked language model; text is generated by gpt2, gpt_neo, opt"):
        make_generator(tiny.model("bert"), decoding=Decoding(max_new_tokens=4), batch_size=1)


def test_end_ids(tmp_path, tokenizer):
    """By generation_config.json, else config.json, else the tokenizer's eos, else its sep."""

    def ends(generation=None, **fields):
        tiny.config("gpt2", **fields).save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        return end_ids(hub.load_config(tmp_path), words)

    words = copy.deepcopy(tokenizer)
    words.sep_token = "w9"
    sep, eos = words.sep_token_id, words.eos_token_id
    assert len({sep, eos, 2, 7}) >= 3
    assert ends({"eos_token_id": [7, 2]}, eos_token_id=5) == (7, 2)
    assert ends({"eos_token_id": 7}, eos_token_id=5) == (7,)
    assert ends(eos_token_id=5) == (5,) and ends(eos_token_id=[5, 6]) == (5, 6)
    assert ends({"eos_token_id": []}, eos_token_id=None) == (eos,)
    assert ends(eos_token_id=50256) == (eos,)  # beyond the vocabulary, as the default of GPT-2's class
    words.eos_token = None
    assert ends(eos_token_id=None) == (sep,)
    words.sep_token = None
    assert ends(eos_token_id=None) == ()
    for odd in ({"eos_token_id": "2"}, {"eos_token_id": [2, None, True]}, {"eos_token_id": 2.0}):
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is"):
            ends(odd)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        hub.load_config(tmp_path)


@pytest.mark.slow
def test_long_contexts_cost_nothing_where_they_are_not_used():
    """131,072 rotary positions would be a mask of 17 GB a layer; what is decoded is what 20 positions give."""
    completions = [
        greedy(tiny.model("mistral", **fields), params_of("mistral"), PROMPTS[:1], 4)
        for fields in ({}, {"max_position_embeddings": 131_072})
    ]
    assert completions[0] == completions[1]


def test_rows_that_fill_up_a_batch_end_before_they_begin():
    model, params = tiny.model("gpt2"), params_of("gpt2")
    batch = generate.left_padded(PROMPTS[:1], rows=3, width=8, pad_id=PAD)
    decode = make_decoder((model,), weights=(1.0,), decoding=Decoding(max_new_tokens=3, pad_id=PAD))
    out = decode((params,), **batch, keys=jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(out.lengths, [3, 0, 0])
    np.testing.assert_array_equal(out.tokens[1:], PAD)
