"""Real pre-trained masked LMs, distilled a few steps on real text: the held-out KL falls and torch opens the export."""

import json
from pathlib import Path

import pytest

from jaxdistill import train

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
