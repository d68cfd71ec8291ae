"""The report of scripts/reproduce_layerdrop.py: figures made up, so that its means, spreads and tests are known."""

import argparse
import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from experiment import arms_of, folder_of, write_text

from jaxdistill.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce_layerdrop.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def write_runs(script, workdir: Path, seeds) -> None:
    """Every figure of run r and seed s is 10 r + s (1 + r / 100)."""
    names_of_runs = [*map(script["name_of"], script["RATES"]), *script["ARMS"]]
    for seed in seeds:
        for r, name in enumerate(names_of_runs):
            folder = folder_of(workdir, seed, name)
            folder.mkdir(parents=True)
            value = 10 * r + seed * (1 + r / 100)
            names = ["train/last", "train/average"]
            names += [f"{split}/{name}" for split in ("valid", "test") for name in ("mlm_loss", "kl", "top1")]
            names += [f"{split}/mlm_loss/every_other" for split in ("valid", "test")]
            (folder / "result.json").write_text(json.dumps(dict.fromkeys(names, value)))
            lines = [
                {"step": step, "kind": "eval", "mlm_loss": 7 - step - r * seed / 10, "mlm_loss/every_other": 8 - step}
                for step in (0, 1, 2)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def flags_of(script, workdir: Path, *, out: Path | None, arms: str = "", section: str = "layerdrop"):
    names = arms or ";".join(script["ARMS"])
    return argparse.Namespace(workdir=workdir, out=out, arms=names, section=section)


def test_the_report(script, tmp_path, capsys):
    write_runs(script, tmp_path, [1, 2, 4])
    (tmp_path / "seed9").mkdir()  # begun and not complete: not in the report
    out = tmp_path / "results.md"
    out.write_text("# Mine\n\n<!-- layerdrop -->\nold\n<!-- /layerdrop -->\n\nAnd mine.\n")
    flags = flags_of(script, tmp_path, out=out)
    script["report"](flags)
    text = out.read_text()
    assert text.startswith("# Mine\n") and text.endswith("\nAnd mine.\n") and "old" not in text
    assert "Seeds 1, 2, 4;" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| teacher, rate 0.1 ")]
    assert row.count(f"12.357 ± {1.01 * np.std([1, 2, 4], ddof=1):.3f}") == 5  # the second run
    tests = [line for line in text.splitlines() if ", p " in line]
    assert len(tests) == len(script["ARMS"]) - 1
    # Run 8 against run 3: 50 + 0.05 s. With two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    differences = 50 + 0.05 * np.array([1, 2, 4])
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    assert f"{differences.mean():+.3f} [" in tests[-1] and f"p {1 - t / np.sqrt(t**2 + 2):.2g}" in tests[-1]
    picture = (tmp_path / "layerdrop.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    script["report"](flags)
    assert out.read_text() == text
    # The losses of the sixth run are below those of the fourth by s / 5, after every number of updates.
    (row,) = [line for line in text.splitlines() if line.startswith("| rate 0.2 taught by rate 0.2 | -")]
    assert row.count(f"{-0.2 * 7 / 3:.3f} ± {0.2 * np.std([1, 2, 4], ddof=1):.3f}") == 3


def test_a_report_of_some_arms_is_of_the_seeds_that_have_these(script, tmp_path, capsys):
    """What a longer distillation asks has three arms, and a place of its own beside the others' in the document."""
    write_runs(script, tmp_path, [1, 2])
    (folder_of(tmp_path, 2, "random weights taught by rate 0") / "result.json").unlink()
    out = tmp_path / "results.md"
    some = "rate 0 taught by rate 0;rate 0.2 taught by rate 0"
    script["report"](flags_of(script, tmp_path, out=out, arms=some, section="layerdrop-long"))
    text = out.read_text()
    assert text.startswith("<!-- layerdrop-long -->") and "Seeds 1, 2;" in text and "random" not in text
    assert "teacher, rate 0.2" in text and "teacher, rate 0.1" not in text
    assert (tmp_path / "layerdrop-long.png").exists()
    script["report"](flags_of(script, tmp_path, out=None))
    assert "1 complete seed(s)" in capsys.readouterr().out


def test_one_seed_makes_no_report(script, tmp_path, capsys):
    write_runs(script, tmp_path, [3])
    script["report"](flags_of(script, tmp_path, out=None))
    assert "needs two" in capsys.readouterr().out
    assert not (tmp_path / "results.md").exists()


def test_texts_are_cleaned_and_must_be_there(tmp_path):
    (tmp_path / "wiki.txt").write_text("a state @-@ of @-@ the @-@ art <unk> of 1 @,@ 000 or 1 @.@ 5\n")
    (tmp_path / "more.gz").write_bytes(gzip.compress("and mère\n".encode()))
    written = write_text(f"{tmp_path}/*.txt,{tmp_path}/more.gz", "--valid", tmp_path / "text" / "valid.txt")
    assert written.read_text() == "a state-of-the-art [UNK] of 1,000 or 1.5\nand mère\n"
    with pytest.raises(UserError, match=r"--train .*absent.* names no file"):
        write_text(f"{tmp_path}/absent*", "--train", tmp_path / "text" / "train.txt")


def test_arms_come_in_the_order_of_the_experiment_and_must_be_known():
    assert arms_of(argparse.Namespace(arms="c;a"), "abc") == ["a", "c"]
    with pytest.raises(UserError, match="--arms names 'd', which is no arm; take some of a; b; c"):
        arms_of(argparse.Namespace(arms="a;d"), "abc")
