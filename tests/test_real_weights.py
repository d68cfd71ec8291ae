"""Real pre-trained models, distilled a few steps on real text: the held-out KL falls and torch opens the export."""

import json
import re
from pathlib import Path

import grids
import pytest
import tiny_run

from jaxdistill import train
from jaxdistill.config import DIVERGENCES

pytestmark = pytest.mark.slow

PROMPT = "The European [MASK] voted on the proposal."


def distil(shared: Path, workdir: Path, *extra: str) -> list[dict]:
    """A few steps of configs/bert_mlm.py on a real teacher; returns the evaluations before and after."""
    arguments = {
        "teacher.name": shared / "models" / "minilm-l6-mlm",
        "student.family": "",
        "data.limit": 1000,
        "data.max_length": 32,
        "data.buckets": "(32,)",
        "data.cache_dir": workdir.parent / "cache",
        "loss.tokens": "masked",
        "train.steps": 12,
        "train.batch_size": 16,
        "train.accumulation": 1,
        "optim.learning_rate": 1e-3,
        "evaluate.batches": 3,
        "evaluate.batch_size": 16,
        "evaluate.prompts": f"('{PROMPT}',)",
        "mesh.data": 8,
        "mask.group": 2,
        "export.to": "('pytorch',)",
    }
    recipe = Path(__file__).parents[1] / "configs" / "bert_mlm.py"
    argv = [f"--config={recipe}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in arguments.items()), *extra]
    assert train.main(argv) == 0
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "eval"]


STUDENTS = {
    "half of the layers": [],
    "narrower, from a folder": ["--config.student.name={shared}/models/bert-tiny-bleurt-encoder"],
    "distilbert": ["--config.student.family=distilbert"],
}
CORPORA = {
    "half of the layers": "europarl/dev.en.txt.gz",
    "narrower, from a folder": "tweets/dev.txt",
    "distilbert": "wikipedia/exllamav3_wiki_docs.txt",
}


# Every day a story-teller with real weights is trained, below, and the quickstart's BERT, by the smoke of bert_mlm.
@pytest.mark.weekly
@pytest.mark.parametrize("student", STUDENTS)
def test_a_few_steps_lower_the_held_out_kl_and_torch_opens_the_export(
    student: str, shared: Path, tmp_path: Path
) -> None:
    corpus = f"--config.data.path={shared / 'corpora' / CORPORA[student]}"
    extra = [argument.format(shared=shared) for argument in STUDENTS[student]]
    before, after = distil(shared, tmp_path / "run", corpus, *extra)
    assert (before["step"], after["step"]) == (0, 12)
    assert after["kl"] < 0.97 * before["kl"]
    assert after["mlm_loss"] < before["mlm_loss"]

    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(tmp_path / "run" / "export-pytorch"), device="cpu")
    words = fill(PROMPT)
    assert len(words) == 5 and all(word["token_str"].strip() for word in words)


# What changes for each objective, beside the settings of the test below.
OBJECTIVES = {
    **{name: {"loss.divergence": name} for name in DIVERGENCES},
    "student writes": {"loss.divergence": "jsd", "sample.student": 0.5},
    "teacher writes": {"loss.alpha_ce": 0.0, "sample.teacher": 1.0},
    "policy gradient": {"loss.alpha_ce": 0.0, "loss.alpha_policy": 1.0},
}


# One that writes text and compares the exact logits stands for all; tiny models are trained by each of the others.
@pytest.mark.parametrize("objective", grids.everyday(OBJECTIVES, "student writes"))
def test_a_story_teller_of_fewer_layers(objective: str, shared: Path, tmp_path: Path) -> None:
    """The Llama of 5 layers cut to 3: by every objective it comes closer to its teacher, and it writes English."""
    stories = json.loads((shared / "corpora" / "tinystories" / "tinystories_1000.json").read_text())
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    arguments = {
        "teacher.name": shared / "models" / "stories260k-llama",
        "student.name": "",
        "student.layers": "0,1,4",
        "data.source": "jsonl",
        "data.path": tmp_path / "stories.jsonl",
        "data.prompt_column": "",
        "data.column": "text",
        "data.limit": 500,
        "data.max_length": 96,
        "data.buckets": "(96,)",
        "data.cache_dir": tmp_path.parent / "cache",
        "loss.alpha_clm": 1.0,
        "loss.beta": 0.1 if objective.startswith("skewed") else 0.5,
        "sample.prompt_tokens": 32,
        "sample.max_new_tokens": 32,
        "train.steps": 40,
        "train.batch_size": 16,
        "train.accumulation": 1,
        "optim.learning_rate": 3e-3,
        "evaluate.metrics": "('perplexity','agreement')",
        "evaluate.batches": 4,
        "evaluate.batch_size": 8,
        "evaluate.every": 40,
        "evaluate.prompts": "('Once upon a time, there was a little girl named',)",
        "evaluate.max_new_tokens": 60,
        **OBJECTIVES[objective],
    }
    recipe = Path(__file__).parents[1] / "configs" / "gpt2_kd.py"
    argv = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in arguments.items())]
    code, out, err = tiny_run.call(train.main, argv)
    assert code == 0, err
    before, after = (r for r in tiny_run.records(tmp_path / "run", "eval"))
    assert after["kl"] < 0.7 * before["kl"] and after["clm_loss"] < before["clm_loss"]
    written = (out + err).split("student: ")[1].splitlines()[0]
    known = set(re.findall(r"[a-z]+", " ".join(stories).lower()))
    words = re.findall(r"[a-z]+", written.lower())
    assert len(words) > 8 and sum(word in known for word in words) > 0.8 * len(words), written
