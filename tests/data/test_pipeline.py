import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.config import Config
from jaxdistill.data.masking import masked_capacity
from jaxdistill.data.pipeline import Hosts, Schedule, steps_per_epoch
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.data.store import TokenStore
from jaxdistill.data.text import Text, held_out_batches, train_batches
from jaxdistill.data.vocabulary import Vocabulary
from jaxdistill.errors import UserError
from jaxdistill.run.assemble import held_out_of, train_batches_of

pytestmark = pytest.mark.newest

VOCABULARY = Vocabulary(size=300, bos=2, eos=3, pad=0, unk=1, mask=4, special=(0, 1, 2, 3, 4))
MASK = MaskConfig(fraction=0.15, replace=(0.8, 0.1, 0.1), smoothing=0.7, group=2)
DATA = DataConfig(max_length=32, buckets=(16, 32), threads=2, prefetch=4)
KEYS = {"input_ids", "attention_mask", "labels", "label_mask"}


def make_store(rows=45):
    """Row i holds token 5 + i in its middle, so that a batch shows which rows it has."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 33, rows)
    tokens = [np.r_[2, np.full(length - 2, 5 + row), 3] for row, length in enumerate(lengths)]
    flat = np.concatenate(tokens).astype(np.uint16)
    return TokenStore(
        path=Path("store"),
        meta={},
        tokens=flat,
        offsets=np.r_[0, np.cumsum(lengths)],
        lengths=lengths,
        token_counts=np.bincount(flat, minlength=VOCABULARY.size),
    )


STORE = make_store()


TEXT = Text(STORE, STORE, STORE.token_counts, VOCABULARY, STORE.path, causal=False)


def train(*, mask=MASK, host=0, hosts=1, steps=15, limit_batches=0, seed=5, text=TEXT, **data):
    schedule = Schedule(batch_size=8, steps=steps, limit_batches=limit_batches, seed=seed)
    return train_batches(text, DATA.model_copy(update=data), mask, schedule, hosts=Hosts(host, hosts))


def evaluation(*, mask=MASK, batch_size=8, limit=0, host=0, hosts=1, **data):
    data = DATA.model_copy(update=data)
    return held_out_batches(TEXT, data, mask, batch_size=batch_size, limit=limit, hosts=Hosts(host, hosts))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b) == KEYS
        for key in KEYS:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def rows_of(batches):
    return [int(row[1]) - 5 for batch in batches for row in batch["labels"][batch["attention_mask"].any(axis=1)]]


def test_each_row_once_an_epoch():
    assert [steps_per_epoch(STORE, batch_size=8, limit_batches=limit) for limit in (0, 4, 9)] == [6, 4, 6]
    batches = list(train(steps=12))
    assert len(batches) == 12
    first, second = rows_of(batches[:6]), rows_of(batches[6:])
    assert sorted(first) == sorted(second) == list(range(45))
    assert first != second
    for batch in batches:
        assert batch["input_ids"].shape[0] == 8 and batch["input_ids"].shape[1] in (16, 32)
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "input_ids": "int32",
            "labels": "int32",
            "attention_mask": "bool",
            "label_mask": "bool",
        }
        bound = masked_capacity(fraction=0.15, group=2, width=batch["input_ids"].shape[1])
        assert batch["label_mask"].reshape(4, -1).sum(axis=1).max() <= bound


def test_limited_epochs_begin_anew():
    limited, whole = list(train(steps=8, limit_batches=4)), list(train(steps=12))
    assert_same(limited[:4], whole[:4])
    # The second epoch has its own order and masks of its own steps.
    assert rows_of(limited[4:]) == rows_of(whole[6:10])
    assert_same(list(train(limit_batches=99)), list(train()))


def test_two_hosts_have_the_halves_of_one():
    whole = list(train())
    parts = [list(train(host=host, hosts=2)) for host in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_threads_change_nothing_and_the_seed_does():
    batches = list(train())
    assert_same(batches, list(train(threads=0, prefetch=0)))
    assert rows_of(batches) != rows_of(list(train(seed=6)))


def test_the_seed_of_a_run_changes_its_training_masks_and_no_held_out_masks():
    def config(seed: int) -> Config:
        return Config(seed=seed).changed(
            data=dict(DATA), mask=dict(MASK), evaluate={"batch_size": 8}, train={"batch_size": 8}
        )

    assert_same(held_out_of(config(0), TEXT), held_out_of(config(1), TEXT))
    rows = [list(train_batches_of(config(seed), TEXT, steps=6)) for seed in (0, 1)]
    label_masks = [
        {
            int(row[1]): mask.tolist()
            for batch in batches
            for row, mask in zip(batch["labels"], batch["label_mask"], strict=True)
        }
        for batches in rows
    ]
    assert label_masks[0].keys() == label_masks[1].keys() and label_masks[0] != label_masks[1]


@pytest.mark.parametrize("stop", [0, 1, 7, 14])
def test_a_restored_iterator_goes_on_as_if_uninterrupted(stop):
    batches = list(train())
    interrupted = train()
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    restored = train()
    restored.set_state(state)
    assert_same(list(restored), batches[stop:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hosts": 3}, "batch of 8 rows does not divide into 3 hosts"),
        ({"mask": MASK.model_copy(update={"group": 3})}, "groups of 3 rows"),
        ({"text": TEXT._replace(token_counts=np.ones(299, int))}, "299 token counts for a tokenizer of 300"),
        ({"text": TEXT._replace(vocabulary=dataclasses.replace(VOCABULARY, mask=None))}, "no mask token"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        train(**change)


def test_evaluation_sees_each_row_once_with_fixed_masks(monkeypatch):
    batches = evaluation()
    assert len(batches) == 6
    assert sorted(rows_of(batches)) == list(range(45))
    assert_same(list(batches), list(evaluation()))
    assert_same([batches[4]], [evaluation()[4]])
    with pytest.raises(IndexError):
        batches[6]
    monkeypatch.setattr("jaxdistill.data.text.HELD_OUT_SEED", 2)
    assert (batches[0]["label_mask"] != evaluation()[0]["label_mask"]).any()


def test_evaluation_masks_do_not_depend_on_how_rows_are_batched():
    def by_row(batches):
        found = {}
        for batch in batches:
            for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                if mask.any():
                    found[int(row[1]) - 5] = ids[mask].tolist()
        return found

    expected = by_row(evaluation())
    assert len(expected) == 45
    for change in (
        {"batch_size": 3},
        {"buckets": (32,)},
        {"mask": MASK.model_copy(update={"group": 8})},
        {"batch_size": 16},
    ):
        assert by_row(evaluation(**change)) == expected, change
    halves = [batch for host in range(2) for batch in evaluation(host=host, hosts=2)]
    assert by_row(halves) == expected


def test_evaluation_limit_counts_batches():
    assert_same(list(evaluation(limit=2)), list(evaluation())[:2])
    assert len(evaluation(limit=99)) == 6


def special_alone(rows=20):
    tokens = np.tile(np.array([2, 1, 1, 3], np.uint16), rows)
    offsets = np.arange(rows + 1) * 4
    return dataclasses.replace(STORE, tokens=tokens, offsets=offsets, lengths=np.diff(offsets))


def test_text_without_a_token_to_mask_is_refused():
    """Its loss would be 0, and its perplexity 1."""
    for text, make in (
        (TEXT._replace(held_out=special_alone()), lambda text: held_out(text, limit=0)),
        (TEXT._replace(held_out=special_alone()), lambda text: held_out(text, limit=2)),
        (TEXT._replace(train=special_alone()), lambda text: train(text=text)),
    ):
        with pytest.raises(UserError, match=r"text in 'store' has no token to predict in \d batches of 8 rows"):
            make(text)


def held_out(text, *, limit, prompt_loss=False):
    return held_out_batches(
        text, DATA.model_copy(update={"prompt_loss": prompt_loss}), MASK, batch_size=8, limit=limit, hosts=Hosts(0, 1)
    )


def test_held_out_prompts_without_completions_are_refused():
    """Rows that end inside of their prompts predict nothing, unless the prompt is predicted as well."""
    documents, prompts = STORE.offsets, STORE.lengths
    store = dataclasses.replace(STORE, meta={"pack": False}, documents=documents, prompts=prompts)
    text = Text(store, store, STORE.token_counts, VOCABULARY, STORE.path, causal=True)
    with pytest.raises(UserError, match=r"held-out text in 'store' has no token to predict"):
        held_out(text, limit=0)
    assert held_out(text, limit=0, prompt_loss=True)[0]["label_mask"].any()
