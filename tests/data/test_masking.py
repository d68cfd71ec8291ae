import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data.batching import collate
from jaxdistill.data.masking import MaskDraw, make_mask_draw, mask_batch, masked_capacity, smoothing_weights
from jaxdistill.data.settings import MaskConfig
from jaxdistill.data.vocabulary import Vocabulary
from jaxdistill.errors import UserError

VOCABULARY = Vocabulary(size=50, bos=2, eos=3, pad=0, unk=1, mask=4, special=(0, 1, 2, 3, 4))
COUNTS = np.arange(50) ** 2
PLAIN = smoothing_weights(COUNTS, smoothing=0.0, special=VOCABULARY.special)
SMOOTH = smoothing_weights(COUNTS, smoothing=0.7, special=VOCABULARY.special)


def make_batch(lengths, *, width, seed=0):
    rng = np.random.default_rng(seed)
    rows = [np.r_[2, rng.integers(5, 50, length - 2), 3] if length else np.zeros(0, int) for length in lengths]
    return collate(rows, width=width, pad=0)


def mask(batch, *, weights=SMOOTH, seed=7, step=3, first_group=0, **settings):
    draw = MaskDraw(MaskConfig(**{"group": 2, **settings}), VOCABULARY, weights)
    return mask_batch(batch, draw, seed=seed, step=step, first_group=first_group)


def test_weights_are_those_of_the_reference():
    weights = smoothing_weights(np.array([0, 1, 8, 1000]), smoothing=0.7, special=(1,))
    np.testing.assert_allclose(weights, [1, 0, 8**-0.7, 1000**-0.7], rtol=1e-12)


@pytest.mark.parametrize(("smoothing", "fits"), [(0.7, True), (90.0, True), (95.0, False), (500.0, False)])
def test_a_smoothing_that_leaves_no_weight_is_refused(smoothing, fits):
    """The most frequent token stands 2,401 times: 2401 ** -91.2 is the smallest normal float64."""
    settings = MaskConfig(smoothing=smoothing)
    if fits:
        assert make_mask_draw(settings, VOCABULARY, COUNTS).weights[5:].min() > 0
    else:
        with pytest.raises(UserError, match=rf"config\.mask\.smoothing={smoothing:g} is too large .* 2,401 times"):
            make_mask_draw(settings, VOCABULARY, COUNTS)


@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(3, 30)), min_size=1, max_size=6).map(lambda a: a + a),
    fraction=st.sampled_from([0.1, 0.15, 0.3]),
    smoothing=st.sampled_from([0.0, 0.7]),
    step=st.integers(0, 10**9),
)
def test_each_group_masks_exactly_its_share_and_never_a_special_token(lengths, fraction, smoothing, step):
    width, group = 32, len(lengths) // 2
    batch = make_batch(lengths, width=width, seed=step)
    weights = smoothing_weights(COUNTS, smoothing=smoothing, special=VOCABULARY.special)
    masked = mask(batch, weights=weights, fraction=fraction, group=group, step=step)

    assert set(masked) == {"input_ids", "attention_mask", "labels", "label_mask"}
    np.testing.assert_array_equal(masked["labels"], batch["input_ids"])
    np.testing.assert_array_equal(masked["attention_mask"], batch["attention_mask"])
    selected = masked["label_mask"]
    assert not np.isin(batch["input_ids"][selected], VOCABULARY.special).any()
    assert not selected[~batch["attention_mask"]].any()
    np.testing.assert_array_equal(masked["input_ids"][~selected], batch["input_ids"][~selected])
    for part in range(2):
        rows = slice(part * group, (part + 1) * group)
        real = int(batch["attention_mask"][rows].sum())
        candidates = int((~np.isin(batch["input_ids"][rows], VOCABULARY.special)).sum())
        count = int(selected[rows].sum())
        assert count == min(math.ceil(fraction * real), candidates)
        assert count <= masked_capacity(fraction=fraction, group=group, width=width)


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_positions_are_drawn_as_torch_multinomial_draws_them(smoothing):
    """How often each position is taken, against the draw of the reference, within five standard errors."""
    torch = pytest.importorskip("torch")
    draws = 4000
    rows = np.array([[2, 5, 5, 9, 20, 49, 3], [2, 30, 7, 45, 3, 0, 0]])
    attention_mask = rows != 0
    weights = smoothing_weights(COUNTS, smoothing=smoothing, special=VOCABULARY.special)
    n_target = math.ceil(0.4 * attention_mask.sum())

    probabilities = torch.tensor(weights[rows.reshape(-1)])
    torch.manual_seed(0)
    drawn = torch.multinomial(probabilities.expand(draws, -1), n_target, replacement=False)
    expected = np.bincount(drawn.numpy().reshape(-1), minlength=rows.size) / draws

    batch = {
        "input_ids": np.tile(rows, (draws, 1)).astype(np.int32),
        "attention_mask": np.tile(attention_mask, (draws, 1)),
    }
    masked = mask(batch, weights=weights, fraction=0.4)["label_mask"]
    got = masked.reshape(draws, -1).mean(axis=0)

    error = np.sqrt(2 * expected * (1 - expected) / draws)
    assert (np.abs(got - expected) <= 5 * error).all(), (got, expected)
    if smoothing:  # rarer tokens are masked more often: 5 before 9 before 20 before 49
        assert got[1] > got[3] > got[4] > got[5]


@pytest.mark.parametrize("replace", [(0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0.2, 0.3, 0.5)])
def test_replacement_proportions(replace):
    batch = make_batch([128] * 400, width=128)
    masked = mask(batch, replace=replace, group=8)
    ids, labels = masked["input_ids"][masked["label_mask"]], masked["labels"][masked["label_mask"]]
    n = len(ids)
    # A random id is the mask token or the old one by chance in one of `size` cases each.
    chance = replace[2] / VOCABULARY.size
    expected = {"mask": replace[0] + chance, "keep": replace[1] + chance, "random": replace[2] - 2 * chance}
    got = {"mask": (ids == 4).mean(), "keep": (ids == labels).mean()}
    got["random"] = 1 - got["mask"] - got["keep"]
    for name, share in expected.items():
        assert abs(got[name] - share) <= 5 * math.sqrt(share * (1 - share) / n) + 1e-12, (
            name,
            got[name],
            share,
        )
    if replace[2]:
        assert set(ids.tolist()) == set(range(VOCABULARY.size)), "uniform over all ids, special ones too"


def test_draw_is_a_function_of_seed_step_and_group():
    batch = make_batch([20, 30] * 4, width=32)
    same = mask(batch)
    np.testing.assert_array_equal(mask(batch)["input_ids"], same["input_ids"])
    for change in ({"seed": 8}, {"step": 4}, {"first_group": 1}):
        assert (mask(batch, **change)["label_mask"] != same["label_mask"]).any(), change
    # The second half alone, told which group it begins with, is the second half of the whole.
    half = {key: value[4:] for key, value in batch.items()}
    np.testing.assert_array_equal(mask(half, first_group=2)["input_ids"], same["input_ids"][4:])


def test_padding_changes_nothing():
    lengths = [20, 30, 11, 3]
    narrow, wide = (mask(make_batch(lengths, width=width)) for width in (32, 64))
    for key, value in narrow.items():
        np.testing.assert_array_equal(value, wide[key][:, :32])
    assert not wide["label_mask"][:, 32:].any()


def test_the_given_batch_stays_as_it_is():
    batch = make_batch([20, 30], width=32)
    before = batch["input_ids"].copy()
    masked = mask(batch)
    assert (masked["input_ids"] != before).any()
    np.testing.assert_array_equal(batch["input_ids"], before)
