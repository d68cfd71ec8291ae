"""The tokens that end a text are the same ones in training data, rollouts, ROUGE, prompts and the exported folder."""

import json

import pytest
import tiny_causal
import tiny_run

from jaxdistill.config import Config
from jaxdistill.data.vocabulary import vocabulary_of
from jaxdistill.evaluate.rouge import greedy
from jaxdistill.models.tokenizer import end_ids
from jaxdistill.run.models import load_pair
from jaxdistill.sampling import on_policy
from jaxdistill.step import sharding


def pair_of(folder, **student):
    config = Config().changed(teacher={"name": str(folder)}, student=student, data={"max_length": 32})
    return load_pair(config, allow_pickle=False, report=lambda line: None)


@pytest.fixture
def teacher(tmp_path):
    words = tiny_causal.make_tokenizer(tiny_run.lines(50))
    return tiny_causal.write_model(tmp_path / "teacher", words)


def set_fields(path, **fields):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **fields}))


@pytest.mark.parametrize("student", [{}, pytest.param({"init": "random"}, marks=pytest.mark.slow)])
def test_several_ends_of_a_teacher(teacher, student, monkeypatch):
    eos = pair_of(teacher).tokenizer.eos_token_id
    set_fields(teacher / "generation_config.json", eos_token_id=[9, 11])
    pair = pair_of(teacher, **student)
    assert vocabulary_of(pair.tokenizer, causal=True).eos == eos  # prepared text stays as it was
    assert pair.teacher is not None
    for model in (pair.student, pair.teacher):
        assert end_ids(model.config, pair.tokenizer) == (9, 11, eos)
        assert greedy(Config().evaluate, model, pair.tokenizer).end_ids == (9, 11, eos)

    made = []

    def make_sampler(**given):
        made.append(given["decoding"])
        return lambda *arguments: {}

    monkeypatch.setattr(on_policy, "make_sampler", make_sampler)
    layout = on_policy.BatchLayout(max_length=32, accumulation=1, group=1, mesh=sharding.make_mesh(data=-1, fsdp=1))
    on_policy._make_writer(Config().sample, pair, layout, mixture=0.0, seed=0)
    assert (made[0].end_ids, made[0].pad_id) == ((9, 11, eos), eos)


def test_a_student_of_its_own_folder_ends_as_the_teacher_does(teacher, tmp_path):
    words = pair_of(teacher).tokenizer
    other = tiny_run.write_model(tmp_path / "other", words, kind="gpt2", seed=1, bos_token_id=5, eos_token_id=5)
    set_fields(teacher / "generation_config.json", eos_token_id=9)
    pair = pair_of(teacher, name=str(other))
    assert end_ids(pair.student.config, pair.tokenizer) == (9, words.eos_token_id)


def test_a_tokenizer_with_sep_and_no_eos(teacher):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((teacher / name).read_text())
        fields["sep_token"] = fields.pop("eos_token")
        (teacher / name).write_text(json.dumps({**fields, "tokenizer_class": "PreTrainedTokenizerFast"}))
    set_fields(teacher / "config.json", eos_token_id=None)
    pair = pair_of(teacher)
    sep = pair.tokenizer.sep_token_id
    assert vocabulary_of(pair.tokenizer, causal=True).eos == sep == pair.tokenizer.eos_token_id
    assert end_ids(pair.student.config, pair.tokenizer) == (sep,)


def test_a_student_from_scratch_ends_as_its_tokenizer_says(teacher):
    sizes = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    config = Config().changed(
        teacher={"name": ""}, tokenizer={"name": str(teacher)}, student={"init": "random", "overrides": sizes}
    )
    pair = load_pair(config, allow_pickle=False, report=lambda line: None)
    assert pair.student.config.eos_token_id == pair.tokenizer.eos_token_id == 0  # 2 by the class
