"""Models in a Python program: loaded, cut, tried out and exported; nearest words against cosines by hand."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run

import jaxdistill
from jaxdistill import cli
from jaxdistill.errors import UserError
from jaxdistill.models.model import embedding_of

CAUSAL = Path(__file__).parents[2] / "configs" / "quickstart" / "causal"


@pytest.fixture(scope="module")
def teacher(tiny) -> Any:
    return jaxdistill.load(tiny.teacher)


def test_parameters_are_read_when_they_are_needed(tiny, teacher):
    assert "params" not in vars(jaxdistill.load(tiny.teacher))
    student = jaxdistill.cut(teacher, "first:2", family="distilbert")
    assert str(student).startswith("distilbert, ") and "layers 0,1 of" in str(student)
    assert student.num_params == sum(np.size(leaf) for leaf in jax.tree.leaves(student.params))


@pytest.mark.slow
def test_a_student_of_all_layers_fills_masks_as_its_teacher(teacher):
    texts = ["the cat [MASK] the dog.", "a small [MASK] house."]
    whole = jaxdistill.fill_mask(jaxdistill.cut(teacher, 4), texts, top=3)
    for ours, theirs in zip(whole, jaxdistill.fill_mask(teacher, texts, top=3), strict=True):
        assert [word for word, _ in ours] == [word for word, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], rel=1e-4)
    assert jaxdistill.fill_mask(teacher, texts[0]) == jaxdistill.fill_mask(teacher, texts[:1])


def test_nearest_words_are_those_of_the_largest_cosine(teacher):
    vocabulary = teacher.tokenizer.get_vocab()
    table = np.asarray(embedding_of(teacher.model, teacher.params), np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    words = [word for word in vocabulary if word.isalpha()]  # neither [MASK] nor ##s nor a full stop
    (found,) = jaxdistill.neighbours(teacher, "cat", top=4).values()
    by_hand = {word: float(table[vocabulary["cat"]] @ table[vocabulary[word]]) for word in words if word != "cat"}
    assert [word for word, _ in found] == sorted(by_hand, key=lambda word: -by_hand[word])[:4]
    assert [cosine for _, cosine in found] == pytest.approx(sorted(by_hand.values(), reverse=True)[:4], abs=1e-5)


def test_a_word_of_several_tokens_is_their_mean(teacher):
    pieces = teacher.tokenizer.tokenize("catdog")
    assert len(pieces) > 1
    table = np.asarray(embedding_of(teacher.model, teacher.params), np.float64)
    mean = table[teacher.tokenizer.convert_tokens_to_ids(pieces)].mean(axis=0)
    ((near, cosine),) = jaxdistill.neighbours(teacher, "catdog", top=1)["catdog"]
    row = table[teacher.tokenizer.get_vocab()[near]]
    assert cosine == pytest.approx(row @ mean / np.linalg.norm(row) / np.linalg.norm(mean), abs=1e-5)


def test_words_of_a_tokenizer_of_bytes():
    """GPT-2's tokens that begin no word are no candidates, and a word is looked up as it stands after a space."""
    found = jaxdistill.neighbours(CAUSAL, ["peace"], top=8)["peace"]
    model = jaxdistill.load(CAUSAL)
    assert f"Ġ{found[0][0]}" in model.tokenizer.get_vocab()
    assert "peace" not in [word for word, _ in found] and len({word for word, _ in found}) == 8


@pytest.mark.slow
def test_generate_is_the_command(tmp_path):
    prompts = ["The people of", "We must"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    code, out, _ = tiny_run.call(
        cli.main, ["generate", f"--model={CAUSAL}", f"--input={tmp_path / 'prompts.txt'}", "--max-new-tokens=6"]
    )
    ours = jaxdistill.generate(CAUSAL, prompts, max_new_tokens=6)
    assert code == 0 and out.splitlines() == [one.prompt + one.completion for one in ours]


@pytest.mark.slow
def test_a_cut_student_is_exported_with_its_card(tiny, teacher, tmp_path):
    student = jaxdistill.cut(teacher, [1, 3])
    folder = jaxdistill.export(student, tmp_path / "student")
    assert "(layers 1, 3) and not trained" in (folder / "README.md").read_text()
    again = jaxdistill.load(folder)
    asked = "the cat [MASK] the dog."
    ours, theirs = (jaxdistill.fill_mask(one, asked)[0] for one in (student, again))
    assert [word for word, _ in ours] == [word for word, _ in theirs]
    assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], rel=1e-5)


def test_what_cannot_be_done_is_raised(tiny, teacher, tmp_path):
    for call, message in (
        (lambda: jaxdistill.load(tmp_path / "nothing"), "there is no such folder"),
        (lambda: jaxdistill.cut(teacher, [9]), "9"),
        (lambda: jaxdistill.cut(jaxdistill.cut(teacher, 2), 1), "is itself cut from"),
        (lambda: jaxdistill.fill_mask(CAUSAL, "a [MASK]"), "a gpt2 fills no masks"),
        (lambda: jaxdistill.fill_mask(teacher, "no mask"), r"fill_mask: 'no mask' holds no \[MASK\]"),
        (lambda: jaxdistill.neighbours(teacher, [" "]), "a word is empty"),
        (lambda: jaxdistill.neighbours(teacher, "Ж"), "does not know the word 'Ж'"),
        (lambda: jaxdistill.export(teacher, tmp_path / "x"), "is a model folder already"),
        (lambda: jaxdistill.export(jaxdistill.cut(teacher, 2), tmp_path / "x", to="onnx"), "onnx"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_command_compares_models_side_by_side(tiny):
    names = [str(tiny.teacher), str(CAUSAL)]
    argv = ["neighbours", *(f"--model={name}" for name in names), "--words=house", "--top=2"]
    code, out, err = tiny_run.call(cli.main, argv)
    assert code == 0, err
    head, row = out.splitlines()
    assert head.split() == ["word", *names] and row.startswith("house") and row.count("(") == 4
    for wrong, message in (
        (["neighbours", "--words=a"], "either --run RUN, or --model"),
        (["neighbours", "--words=a", "--model=m", "--base=b"], "--base and --step are of --run"),
        (["neighbours", f"--run={tiny.folder}", "--words=a"], "is no run folder"),
        ([*argv, "--top=0"], "--top 0 must be at least 1"),
    ):
        code, _, err = tiny_run.call(cli.main, wrong)
        assert code == 2 and message in err
