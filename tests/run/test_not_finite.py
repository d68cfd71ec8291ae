"""A loss that is not finite: what the message says to do can be done, and the exit code is not that of a signal."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from jaxdistill import config as configs
from jaxdistill import train
from jaxdistill.config import Config
from jaxdistill.errors import NotFiniteError, UserError
from jaxdistill.run import resume, training
from jaxdistill.run.stop import EXIT_CODE


def test_other_remedies_than_the_two_are_refused_and_both_only_after_a_loss_that_was_not_finite(tmp_path):
    config = Config()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    lower = config.changed(optim={"learning_rate": 1e-5, "clip": 1.0})
    with pytest.raises(UserError, match=r"config\.optim\.clip=5\.0, config\.optim\.learning_rate=0\.0005, and now"):
        resume.began_with(lower, tmp_path)
    resume.mark_not_finite(tmp_path, NotFiniteError("loss is nan"))
    assert resume.began_with(lower, tmp_path) == json.loads(configs.to_json(config))
    with pytest.raises(UserError, match=r"holds a run with config\.optim\.eps=1e-06, and now it is 0\.1"):
        resume.began_with(lower.changed(optim={"eps": 0.1}), tmp_path)
    said: list[str] = []
    resume.go_on_with(lower, tmp_path, json.loads(configs.to_json(config)), old=4, new=4, report=said.append)
    assert [line.split(";")[0] for line in said] == [
        "config.optim.learning_rate is 1e-05 from here on",
        "config.optim.clip is 1.0 from here on",
    ]
    # From here on it is the rate of this run.
    assert resume.began_with(lower, tmp_path) is not None
    with pytest.raises(UserError, match=r"learning_rate=1e-05, and now"):
        resume.began_with(config, tmp_path)


def test_a_mark_that_cannot_be_written_does_not_bury_the_error(tmp_path):
    resume.mark_not_finite(tmp_path / "gone", NotFiniteError("loss is nan"))
    (tmp_path / "file").write_text("")
    (tmp_path / ".not-finite.json.part").mkdir()  # so that no file of this name can be written
    resume.mark_not_finite(tmp_path, NotFiniteError("loss is nan"))
    assert not (tmp_path / ".not-finite.json").exists()


@pytest.mark.slow
def test_a_lower_rate_begins_anew_where_there_is_no_checkpoint(tiny, tmp_path):
    run, values = tmp_path / "run", {"evaluate__every": 100, "optim__schedule": "constant", "optim__warmup": 0.0}
    diverges = {"optim__clip": 0.0, "optim__learning_rate": 1e37}  # the first update leaves what float32 can hold
    for _ in range(2):  # the same command comes to the same end
        code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **values | diverges))
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 != EXIT_CODE and "nan" in line and "there is no good checkpoint" in line
        assert "with a lower --config.optim.learning_rate" in line and "with another --workdir" in line
    tiny_run.train(tiny, run, **values)
    assert [record["learning_rate"] for record in tiny_run.records(run, "train")] == [pytest.approx(5e-4)] * 4
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "origin.json", "probe.json", "student",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_lower_rate_goes_on_from_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    run, values = tmp_path / "run", {"checkpoint__every": 1, "evaluate__every": 100, "optim__schedule": "constant"}
    make = training.make_train_step

    def make_breaking(*args, **arguments):
        step = make(*args, **arguments)

        def breaking(state, *inputs):
            scale = np.float32(np.nan if int(state.step) == 2 else 1)
            return step(state._replace(params=jax.tree.map(lambda x: x * scale, state.params)), *inputs)

        return breaking

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_train_step", make_breaking)
        code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **values))
    # In earnest these parameters give the same loss again; here they are good, and it was the step that broke.
    assert code == 2 and f"at step 3; remove {run / 'checkpoints' / '2'}, whose parameters gave this" in err
    assert "; the last good checkpoint is that of step 1. The same command" in err
    code, out, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **values, optim__learning_rate=1e-4))
    assert code == 0 and f"resumed {run} at step 2 of 4" in out + err, err
    assert "config.optim.learning_rate is 0.0001 from here on; it was 0.0005" in out + err
    rates = [record["learning_rate"] for record in tiny_run.records(run, "train")]
    assert rates == [0, *(pytest.approx(rate) for rate in (5e-4, 1e-4, 1e-4))]


@pytest.mark.weekly  # as the test above, for parameters that are bad in earnest
def test_what_the_line_says_can_be_done_where_the_last_checkpoint_has_the_bad_parameters(tiny, tmp_path):
    run = tmp_path / "run"
    values = {"checkpoint__every": 1, "evaluate__every": 100, "optim__schedule": "constant", "optim__warmup": 0.5}
    # The rate rises from 0, so that the first update changes nothing, and the second one leaves what float32 can hold.
    diverges = {"optim__clip": 0.0, "optim__learning_rate": 1e37}
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **values | diverges))
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    bad = Path(line.partition("remove ")[2].partition(",")[0])
    assert code == 2 and bad == run / "checkpoints" / "2" and "the last good checkpoint is that of step 1" in line
    shutil.rmtree(bad)
    tiny_run.train(tiny, run, **values)
    assert [record["step"] for record in tiny_run.records(run, "train")] == [1, 2, 3, 4]
