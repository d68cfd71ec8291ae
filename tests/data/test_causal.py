import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data.batching import EMPTY
from jaxdistill.data.causal import next_tokens, pairs_of
from jaxdistill.data.pipeline import Hosts, Schedule
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.data.store import TokenStore
from jaxdistill.data.text import Text, held_out_batches, train_batches
from jaxdistill.data.vocabulary import Vocabulary
from jaxdistill.errors import UserError

PAD = 0
VOCABULARY = Vocabulary(size=300, bos=1, eos=1, pad=PAD, unk=None, mask=None, special=(0, 1))
DATA = DataConfig(max_length=32, buckets=(16, 32), prompt_loss=False, threads=2, prefetch=4)
DTYPES = {"input_ids": "int32", "attention_mask": "bool", "labels": "int32", "label_mask": "bool"}


def make_store(lengths, prompts, *, row=0):
    """Documents of random tokens, each a row; with `row`, packed into rows of that length, the rest dropped."""
    lengths, prompts = np.array(lengths, np.int64), np.array(prompts, np.int64)
    documents = np.r_[0, np.cumsum(lengths)]
    end = documents[-1] // row * row if row else documents[-1]
    tokens = np.random.default_rng(0).integers(1, 300, end).astype(np.uint16)
    documents = np.r_[documents[documents < end], end]
    offsets = np.arange(0, end + 1, row) if row else documents
    return TokenStore(
        path=Path("store"),
        meta={"pack": bool(row)},
        tokens=tokens,
        offsets=offsets,
        lengths=np.diff(offsets),
        token_counts=np.bincount(tokens, minlength=300),
        documents=documents,
        prompts=prompts[: len(documents) - 1],
    )


def random_store(rows=45, *, row=0):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 33, rows)
    return make_store(lengths, rng.integers(0, lengths), row=row)


STORE, PACKED = random_store(), random_store(row=16)


def text_of(store):
    return Text(store, store, store.token_counts, VOCABULARY, store.path, causal=True)


def train(store=STORE, *, host=0, hosts=1, steps=15, limit_batches=0, seed=5, **data):
    schedule = Schedule(batch_size=8, steps=steps, limit_batches=limit_batches, seed=seed)
    data = DATA.model_copy(update=data)
    return train_batches(text_of(store), data, MaskConfig(), schedule, hosts=Hosts(host, hosts))


def evaluation(store=STORE, *, batch_size=8, limit=0, host=0, hosts=1, **data):
    data, hosts = DATA.model_copy(update=data), Hosts(host, hosts)
    return held_out_batches(text_of(store), data, MaskConfig(), batch_size=batch_size, limit=limit, hosts=hosts)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b) >= set(DTYPES)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def rows_of(batches):
    """The tokens of each row; no two rows of the stores here are alike."""
    return [
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        if mask.any()
    ]


def all_rows(store):
    return [tuple(store[row].tolist()) for row in range(len(store))]


def reference_row(store, row, *, width, prompt_loss):
    """Token by token: ids, real, label where one counts, else None, and document, of one row."""
    ids, real, labels, segments = [], [], [], []
    ids_of_all = store.tokens[:]
    for place in range(store.offsets[row], store.offsets[row] + width) if row != EMPTY else [None] * width:
        here = place is not None and place < store.offsets[row + 1]
        ids.append(int(ids_of_all[place]) if here else PAD)
        real.append(here)
        document = sum(start <= place for start in store.documents[:-1].tolist()) if here else 0
        segments.append(document)
        label = None
        if here and place + 1 < store.offsets[row + 1] and place + 1 < store.documents[document]:
            is_prompt = place + 1 - store.documents[document - 1] < store.prompts[document - 1]
            if prompt_loss or not is_prompt:
                label = int(ids_of_all[place + 1])
        labels.append(label)
    return ids, real, labels, [segment and segment - segments[0] + 1 for segment in segments]


def check_batch(batch, store, rows, *, width, prompt_loss):
    expected = [reference_row(store, row, width=width, prompt_loss=prompt_loss) for row in rows]
    ids, real, labels, segments = (list(part) for part in zip(*expected, strict=True))
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == real
    pairs = zip(batch["labels"].tolist(), batch["label_mask"].tolist(), strict=True)
    found = [[label if counts else None for label, counts in zip(*row, strict=True)] for row in pairs]
    assert found == labels
    if store.meta["pack"]:
        assert batch["segment_ids"].tolist() == segments
    dtypes = {**DTYPES, "segment_ids": "int32"} if store.meta["pack"] else DTYPES
    assert {key: value.dtype.name for key, value in batch.items()} == dtypes


@given(
    documents=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=10),
    row=st.integers(4, 9),
    prompt_loss=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("pack", [False, True])
def test_batches_are_those_of_a_loop_over_tokens(pack, documents, row, prompt_loss, data):
    lengths, prompts = zip(*documents, strict=True)
    # A prompt may reach the end of its document (a cut one), not beyond.
    store = make_store(lengths, np.minimum(prompts, lengths), row=row if pack else 0)
    if not len(store):
        return
    start = data.draw(st.integers(0, len(store) - 1), "start of a slice")
    store = store.slice(start, data.draw(st.integers(start + 1, len(store)), "end"))
    rows = data.draw(st.lists(st.integers(EMPTY, len(store) - 1), min_size=1, max_size=4), "rows")
    width = int(store.lengths.max()) + data.draw(st.integers(0, 3), "padding")
    batch = next_tokens(store, np.array(rows), width=width, pad=PAD, prompt_loss=prompt_loss)
    check_batch(batch, store, rows, width=width, prompt_loss=prompt_loss)


def test_what_is_predicted_of_a_pair():
    store = make_store([7], [4])
    batch = next_tokens(store, np.array([0]), width=8, pad=PAD, prompt_loss=False)
    tokens = store.tokens[:].tolist()
    assert batch["label_mask"][0].tolist() == [False, False, False, True, True, True, False, False]
    assert batch["labels"][0, 3:6].tolist() == tokens[4:], "from the last prompt token to the end"
    whole = next_tokens(store, np.array([0]), width=8, pad=PAD, prompt_loss=True)
    assert whole["label_mask"][0].tolist() == [True] * 6 + [False] * 2
    assert whole["labels"][0, :6].tolist() == tokens[1:]


def test_nothing_is_predicted_across_packed_documents():
    """Documents of 3, 6, 3 tokens in two rows: the second goes on in the second row, as the first there."""
    store = make_store([3, 6, 3], [0, 5, 1], row=6)
    batch = next_tokens(store, np.array([0, 1]), width=6, pad=PAD, prompt_loss=True)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2]]
    assert batch["label_mask"].tolist() == [[True, True, False, True, True, False]] * 2
    completions = next_tokens(store, np.array([0, 1]), width=6, pad=PAD, prompt_loss=False)["label_mask"]
    # Of the second document only its last token is no prompt, and that is the third of the second row.
    assert completions.tolist() == [
        [True, True, False, False, False, False],
        [False, True, False, True, True, False],
    ]


@pytest.mark.parametrize("store", [STORE, PACKED], ids=["rows", "packed"])
def test_each_row_once_an_epoch(store):
    buckets = (16,) if store is PACKED else (16, 32)
    steps = -(-len(store) // 8)
    batches = list(train(store, steps=2 * steps, buckets=buckets))
    assert len(batches) == 2 * steps
    first, second = rows_of(batches[:steps]), rows_of(batches[steps:])
    assert sorted(first) == sorted(second) == sorted(all_rows(store))
    assert first != second
    places = {tokens: row for row, tokens in enumerate(all_rows(store))}
    assert len(places) == len(store)
    for batch in batches:
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"].shape[0] == 8 and width in buckets
        rows = [
            places[tuple(ids[mask].tolist())] if mask.any() else EMPTY
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        check_batch(batch, store, rows, width=width, prompt_loss=False)


def test_limited_epochs_begin_anew():
    limited, whole = list(train(steps=8, limit_batches=4)), list(train(steps=12))
    assert_same(limited[:4], whole[:4])
    assert_same(limited[4:], whole[6:10])


def test_two_hosts_have_the_halves_of_one():
    for make in (train, evaluation):
        parts = [list(make(host=host, hosts=2)) for host in range(2)]
        joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
        assert_same(joined, list(make()))


def test_threads_change_nothing_and_the_seed_does():
    batches = list(train())
    assert_same(batches, list(train(threads=0, prefetch=0)))
    assert rows_of(batches) != rows_of(list(train(seed=6)))


@pytest.mark.parametrize("stop", [0, 1, 7, 14])
def test_a_restored_iterator_goes_on_as_if_uninterrupted(stop):
    batches = list(train())
    interrupted = train()
    for _ in range(stop):
        next(interrupted)
    restored = train()
    restored.set_state(json.loads(json.dumps(interrupted.get_state())))
    assert_same(list(restored), batches[stop:])


def test_what_does_not_fit_is_named():
    for make in (train, evaluation):
        with pytest.raises(UserError, match="batch of 8 rows does not divide into 3 hosts"):
            make(hosts=3)
        with pytest.raises(UserError, match="does not fit the widest bucket of 16"):
            list(make(buckets=(16,)))


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_evaluation_is_in_order_and_does_not_depend_on_batches(prompt_loss):
    def by_row(batches):
        """Tokens of a row -> the labels that count, at their places."""
        found = {}
        for batch in batches:
            for i in np.flatnonzero(batch["attention_mask"].any(axis=1)):
                counts = batch["label_mask"][i]
                where, labels = np.flatnonzero(counts).tolist(), batch["labels"][i, counts].tolist()
                found[rows_of([{key: value[i : i + 1] for key, value in batch.items()}])[0]] = where, labels
        return found

    batches = evaluation(prompt_loss=prompt_loss)
    assert len(batches) == 6 and sorted(rows_of(batches)) == sorted(all_rows(STORE))
    expected = by_row(batches)
    for change in ({"batch_size": 3}, {"buckets": (32,)}, {"batch_size": 16}):
        assert by_row(evaluation(prompt_loss=prompt_loss, **change)) == expected, change
    assert rows_of(evaluation(buckets=(32,))) == all_rows(STORE)
    assert (sum(len(where) for where, _ in expected.values()) == sum(STORE.lengths - 1)) == prompt_loss


def test_evaluation_limit_counts_batches():
    assert_same(list(evaluation(limit=2)), list(evaluation())[:2])
    assert len(evaluation(limit=99)) == 6


def test_pairs_are_taken_apart():
    store = make_store([7, 5, 6, 4], [4, 0, 6, 1])  # the second has no prompt, the third no completion
    ids = store.tokens[:].tolist()
    expected = [(ids[0:4], ids[4:7]), (ids[18:19], ids[19:22])]
    assert pairs_of(store, limit=0) == expected
    assert pairs_of(store, limit=1) == expected[:1]
    assert pairs_of(store.slice(1, 4), limit=0) == expected[1:]


def test_pairs_of_packed_rows_stand_whole_in_them():
    """Documents of 4, 6, 4, 6 tokens in rows of 5, the middle two rows alone: only the third is whole there."""
    store = make_store([4, 6, 4, 6], [2, 2, 2, 2], row=5)
    ids = store.tokens[:].tolist()
    assert len(pairs_of(store, limit=0)) == 4
    assert pairs_of(store.slice(1, 3), limit=0) == [(ids[10:12], ids[12:14])]
    assert pairs_of(store.slice(1, 2), limit=0) == []
