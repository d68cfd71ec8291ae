"""From text to masked batches: this package beside the original DistilBERT scripts.

    python benchmarks/data.py --text corpus.txt --tokenizer bert-base-uncased/ [--megabytes 4] [--rounds 5]

tokenise  from text to what training reads: `jaxdistill prepare`, against scripts/binarized_data.py, which encodes line
          by line with BertTokenizer (in Python) and pickles an array a document; and that with BertTokenizerFast
batches   an epoch of masked batches in host memory: the trainer's iterator, against the sampler, collation and masking
          (in torch) of the scripts, in one process
open      until rows can be read: opening the folder, against unpickling, after which the scripts cut and drop each time
on disk   bytes for each token that is kept, a quarter of a megabyte of token counts with ours

The reference is written anew, step for step, without its logs, its checks and its count of tokens (a third script;
`prepare` counts as it goes). Widths are rounded up to 8 as under its --fp16, numbers of rows and masks are not. Tokens,
rows and masks are compared before anything is timed. The ways run in turn within each round; figures are medians. Each
may use all cores: `taskset -c 0 python …` leaves them one.
"""

import argparse
import math
import pickle
import random
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, RandomSampler
from transformers import BertTokenizer, BertTokenizerFast

from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.data.masking import smoothing_weights
from jaxdistill.data.pipeline import steps_per_epoch
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.data.store import open_store
from jaxdistill.data.text import Text
from jaxdistill.data.vocabulary import Vocabulary
from jaxdistill.models.tokenizer import load_tokenizer
from jaxdistill.run.assemble import train_batches_of

Ways = dict[str, Callable[[], Any]]  # ours first
Drawn = tuple[Any, Any, Any, Any]  # input ids, labels, where they count, where there is no padding


# The reference


def encode(text: Path, tokenizer: Any) -> list[list[int]]:
    with open(text, encoding="utf-8") as file:
        framed = [f"{tokenizer.cls_token} {line.strip()} {tokenizer.sep_token}" for line in file.readlines()]
    return [tokenizer.encode(line, add_special_tokens=False) for line in framed]


def binarize(text: Path, tokenizer: Any, pickled: Path) -> None:
    documents = [np.array(ids, np.uint16) for ids in encode(text, tokenizer)]
    random.shuffle(documents)
    pickled.write_bytes(pickle.dumps(documents, protocol=pickle.HIGHEST_PROTOCOL))


def unpickled(pickled: Path) -> list[np.ndarray]:
    return pickle.loads(pickled.read_bytes())


def cut(documents: Iterable[np.ndarray], vocabulary: Vocabulary, data: DataConfig) -> list[np.ndarray]:
    """Rows of at most max_length, without those that are short or unknown."""
    rows, piece = [], data.max_length - 2
    for document in documents:
        if len(document) <= data.max_length:
            rows.append(document)
            continue
        for start in range(0, len(document), piece):
            row = document[start : start + piece]
            row = row if row[0] == vocabulary.bos else np.insert(row, 0, vocabulary.bos)
            rows.append(row if row[-1] == vocabulary.eos else np.insert(row, len(row), vocabulary.eos))
    rows = [row for row in rows if len(row) >= data.min_tokens]
    return [row for row in rows if np.count_nonzero(row == vocabulary.unk) / len(row) < data.max_unk_fraction]


def grouped(rows: Sequence[np.ndarray], size: int, longest: int) -> Iterator[list[int]]:
    """Batches of rows whose lengths differ by 3 at most, as they fill up; then what is left, from short to long."""
    groups = np.searchsorted(np.arange(3, longest, 4), [*map(len, rows)], side="right").tolist()
    waiting = defaultdict(list)
    for row in RandomSampler(groups):
        waiting[groups[row]].append(row)
        if len(waiting[groups[row]]) == size:
            yield waiting.pop(groups[row])
    rest: list[int] = []
    for group in sorted(waiting):
        rest += waiting[group]
        if len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest:
        yield rest


def padded(rows: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [list(row.astype(int)) + [pad] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([len(row) for row in rows])


def masked(
    ids: torch.Tensor, lengths: torch.Tensor, vocabulary: Vocabulary, weights: torch.Tensor, mask: MaskConfig
) -> Drawn:
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 8), value=vocabulary.pad)
    attended = torch.arange(ids.shape[1]) < lengths[:, None]
    chances = weights[ids.flatten()]
    targets = torch.multinomial(chances / chances.sum(), math.ceil(mask.fraction * int(lengths.sum())))
    chosen = torch.zeros(ids.numel(), dtype=torch.bool)
    chosen[targets] = True
    chosen = chosen.view_as(ids) & (ids != vocabulary.pad)
    real = ids[chosen]
    lot = torch.multinomial(torch.tensor(mask.replace), len(real), replacement=True)
    by_mask, by_random = torch.full_like(real, vocabulary.mask or 0), torch.randint_like(real, vocabulary.size)
    replaced = by_mask * (lot == 0).long() + real * (lot == 1).long() + by_random * (lot == 2).long()
    return ids.masked_scatter(chosen, replaced), ids.masked_fill(~chosen, -100), chosen, attended


def reference_epoch(rows: Any, vocabulary: Vocabulary, weights: torch.Tensor, config: Config) -> Iterator[Drawn]:
    batches = grouped(rows, config.train.batch_size, config.data.max_length)
    for ids, lengths in DataLoader(rows, batch_sampler=batches, collate_fn=partial(padded, pad=vocabulary.pad)):
        yield masked(ids, lengths, vocabulary, weights, config.mask)


# This package


def changed(config: Config, **data: Any) -> Config:
    return config.changed(data=data)


def prepared(config: Config, tokenizer: Any) -> Text:
    """As `jaxdistill prepare`, into a new folder; no rows are held out."""
    config = changed(config, cache_dir=tempfile.mkdtemp(dir=config.data.cache_dir))
    source = texts.open_text(config.data)
    text = texts.prepare_text(config.data, source, tokenizer, causal=False, report=lambda line: None)
    return text._replace(train=open_store(text.path))


def own_epoch(config: Config, text: Text) -> Iterator[Drawn]:
    steps = steps_per_epoch(text.train, batch_size=config.train.batch_size, limit_batches=0)
    for batch in train_batches_of(config, text, steps=steps):
        yield batch["input_ids"], batch["labels"], batch["label_mask"], batch["attention_mask"]


# Comparing and timing


def check_same(name: str, ours: Iterable[Any], reference: Iterable[Any]) -> None:
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if not np.array_equal(a, b):
            raise SystemExit(f"{name} {i}: {a} is not the reference's {b}")


def check_masks(ours: Iterable[Drawn], reference: Iterable[Drawn], counts: np.ndarray, mask_id: int | None) -> None:
    """How many tokens are masked, how, and which: rare ones first, so their mean log count tells."""
    tokens, figures = [], []
    for batches in (ours, reference):
        found = [[np.asarray(x) for x in batch] for batch in batches]
        ids, labels = (np.concatenate([batch[i][batch[2]] for batch in found]) for i in (0, 1))
        tokens.append(sum(int(attended.sum()) for *_, attended in found))
        shares = len(ids) / tokens[-1], np.mean(ids == mask_id), np.mean(ids == labels)
        figures.append([*shares, np.log(counts[labels]).mean()])
    # The first share is rounded up, ours in groups of 8 rows and the reference's in batches; the rest is chance.
    if tokens[0] != tokens[1] or not np.allclose(*figures, rtol=0.01, atol=0.005 + 2 / math.sqrt(0.15 * tokens[0])):
        figures = np.round(figures, 3).tolist()
        raise SystemExit(f"batches of {tokens} tokens; masked, by [MASK], left alone, mean log count: {figures}")


def seconds(ways: Ways, rounds: int) -> dict[str, np.ndarray]:
    """Each way once a round, first in turn another one each time."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds):
        order = list(ways)
        for way in order[i % len(order) :] + order[: i % len(order)]:
            begin = time.perf_counter()
            ways[way]()
            times[way].append(time.perf_counter() - begin)
    return {way: np.array(taken) for way, taken in times.items()}


def report(table: Table, what: str, figures: dict[str, np.ndarray], digits: int) -> None:
    ours = np.median(next(iter(figures.values())))
    for way, values in figures.items():
        low, middle, high = (f"{x:,.{digits}f}" for x in np.percentile(values, [25, 50, 75]))
        table.add_row(what, way, middle, f"{low}-{high}" if len(values) > 1 else "", f"{np.median(values) / ours:.3g}")
        what = ""
    table.add_section()


def clip(config: Config, size: float, out: Path) -> None:
    """The first `size` bytes of the text: whole documents, one a line."""
    source = texts.open_text(config.data).train
    assert source is not None
    with open(out, "wb") as file:
        for text in source.documents():
            file.write(str(text).replace("\r", " ").encode() + b"\n")  # a line end to the reference
            if file.tell() >= size:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files or globs, a document a line; .gz, .zst too")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a BERT's, with vocab.txt and tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=4.0, help="how much of the text")
    for name, default in (("rounds", 5), ("rows", 64), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    config = Config().changed(
        data={"path": ",".join(args.text), "max_length": args.length}, train={"batch_size": args.rows}
    )
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        clip(config, 1e6 * args.megabytes, text)
        measure(changed(config, path=str(text), cache_dir=folder), text, args.tokenizer, args.rounds)


def compare(config: Config, text: Path, own: Any, slow: Any, fast: Any) -> Text:
    """The prepared text, after it was found to be what the reference makes of it, with either tokenizer."""
    documents = encode(text, slow)
    check_same("document of BertTokenizerFast", encode(text, fast), documents)
    whole = prepared(changed(config, max_length=10**9, min_tokens=0, max_unk_fraction=2.0), own).train
    check_same("document", map(whole.__getitem__, range(len(whole))), documents)
    made = prepared(config, own)
    rows = cut(map(np.array, documents), made.vocabulary, config.data)
    check_same("row", map(made.train.__getitem__, range(len(made.train))), rows)
    return made


def measure(config: Config, text: Path, tokenizer: Path, rounds: int) -> None:
    own, pickled = load_tokenizer(tokenizer), text.with_suffix(".pickle")
    slow, fast = BertTokenizer.from_pretrained(tokenizer), BertTokenizerFast.from_pretrained(tokenizer)
    made = compare(config, text, own, slow, fast)
    store, vocabulary = made.train, made.vocabulary
    binarize(text, fast, pickled)
    documents = unpickled(pickled)
    rows = cut(documents, vocabulary, config.data)
    weights = smoothing_weights(store.token_counts, smoothing=config.mask.smoothing, special=vocabulary.special)
    reference = partial(reference_epoch, rows, vocabulary, torch.from_numpy(weights), config)
    check_masks(own_epoch(config, made), reference(), store.token_counts, vocabulary.mask)

    tokenise: Ways = {
        "jaxdistill": lambda: prepared(config, own),
        "BertTokenizerFast, a line at a time": lambda: binarize(text, fast, pickled),
        "BertTokenizer, a line at a time: the scripts": lambda: binarize(text, slow, pickled),
    }
    alone = changed(config, threads=0, prefetch=0)
    batches: Ways = {
        f"jaxdistill, {config.data.threads} threads ahead": lambda: deque(own_epoch(config, made), maxlen=0),
        "jaxdistill, none": lambda: deque(own_epoch(alone, made), maxlen=0),
        "the scripts": lambda: deque(reference(), maxlen=0),
    }
    opening: Ways = {
        "jaxdistill": lambda: open_store(made.path),
        "unpickled": lambda: unpickled(pickled),
        "unpickled, cut, dropped: the scripts": lambda: cut(unpickled(pickled), vocabulary, config.data),
    }
    read, kept = sum(map(len, documents)), store.meta["tokens"]
    disk = {"jaxdistill": made.path.iterdir(), "pickle": [pickled]}

    table = Table("", "way", "median", "quartiles", "of ours")
    for column in table.columns[2:]:
        column.justify = "right"
    report(table, "tokenise, tokens/s", {way: read / x for way, x in seconds(tokenise, rounds).items()}, 0)
    report(table, "batches, tokens/s", {way: kept / x for way, x in seconds(batches, rounds).items()}, 0)
    report(table, "open, ms", {way: 1e3 * x for way, x in seconds(opening, rounds).items()}, 1)
    bytes_each = {way: np.array([sum(file.stat().st_size for file in files) / kept]) for way, files in disk.items()}
    report(table, "on disk, bytes/token", bytes_each, 2)
    size = f"{text.stat().st_size / 1e6:.1f} MB, {len(documents):,} documents, {kept:,} tokens in {len(store):,} rows"
    shape = f"batches of {config.train.batch_size} x {config.data.max_length}"
    Console(width=120).print(f"{size}, {shape}, {torch.get_num_threads()} cores", table)


if __name__ == "__main__":
    main()
