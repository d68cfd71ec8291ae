import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import reference_cut

from jaxdistill.data.frame import Ragged, frame, frame_causal


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    max_length=st.one_of(st.none(), st.integers(4, 20)),
)
def test_frame_cuts_as_the_reference(lengths, max_length):
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    rows, row_lengths = frame(Ragged(tokens, np.array(lengths, np.int64)), bos=1, eos=2, max_length=max_length)
    expected = [row for document in documents for row in reference_cut(document.tolist(), 1, 2, max_length or 10**9)]
    assert row_lengths.tolist() == [len(row) for row in expected]
    assert rows.tolist() == [token for row in expected for token in row]
    assert max_length is None or (row_lengths <= max_length).all()


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    prefix=st.lists(st.integers(1, 3), max_size=2),
    max_length=st.one_of(st.none(), st.integers(4, 20)),
)
def test_causal_frame_cuts_in_consecutive_pieces(lengths, prefix, max_length):
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    settings = dict(prefix=prefix, eos=2, max_length=max_length)
    rows, row_lengths = frame_causal(Ragged(tokens, np.array(lengths, np.int64)), **settings)
    framed = [[*prefix, *document.tolist(), 2] for document in documents]
    step = max_length or 10**9
    expected = [row[start : start + step] for row in framed for start in range(0, len(row), step)]
    assert row_lengths.tolist() == [len(row) for row in expected]
    assert rows.tolist() == [token for row in expected for token in row]
