"""The knobs of the text and of the masks."""

import math
from typing import Annotated, Literal

from jaxdistill.data.sources import SOURCES
from jaxdistill.errors import UserError
from jaxdistill.knobs import OneOf, Rule, Section, knob


def _is_template(value: str) -> bool:
    return value.count("{prompt}") == value.count("{completion}") == 1 and value.endswith("{completion}")


def _are_widths(values: tuple[int, ...]) -> bool:
    return all(value > 2 for value in values) and list(values) == sorted(set(values))


def _are_shares(values: tuple[float, ...]) -> bool:
    return min(values) >= 0 and math.isclose(sum(values), 1, abs_tol=1e-6)


Template = Annotated[str, Rule("must hold {prompt} once and end with {completion}", _is_template)]
Widths = Annotated[tuple[int, ...], Rule("must be ascending numbers of tokens", _are_widths)]
Shares = Annotated[
    tuple[float, float, float], Rule("must be three shares (mask, keep, random) that add up to 1", _are_shares)
]


class DataConfig(Section):
    """The text, and how it becomes rows of tokens."""

    source: Annotated[str, OneOf(SOURCES)] = knob(
        "text",
        "Kind of data: `text` (a document a line), `csv`, `tsv` (a line is a row, a quotation mark a letter), `jsonl` "
        "(an object a line, or an array of objects), `parquet`, `hf` (also folders of `save_to_disk`) or `tfds`.",
        resumable="content",
    )
    path: str = knob(
        "",
        "File, glob or several separated by commas, also compressed (.gz, .zst); for `hf` and `tfds` the data set's "
        "name or folder.",
        resumable="content",
    )
    column: str = knob("text", "Name of the text column, where the source has columns.", resumable="content")
    prompt_column: str = knob(
        "", "Causal models: name of the column of prompts; `column` then names the completions; empty = plain text."
    )
    template: Template = knob(
        "{prompt}\nTL;DR: {completion}",
        "How prompt and completion make one text. All text before {completion} is the prompt, except white space right "
        "before {completion}.",
    )
    prompt_loss: bool = knob(False, "Causal models: also learn to predict the tokens of the prompt.")
    subset: str = knob("", "Configuration of an `hf` or `tfds` data set; empty = the default one.", resumable="content")
    revision: str = knob("", "Branch, tag or commit of an `hf` data set; version of a `tfds` one.", resumable="content")
    split: str = knob("train", "Split of an `hf` or `tfds` data set.", resumable="content")
    streaming: bool = knob(
        False, "`hf`: read over the network without downloading the whole data set first.", resumable="content"
    )
    limit: int = knob(0, "Largest number of documents to read; 0 = all.", ge=0, resumable="content")
    max_document_bytes: int = knob(
        2**24,
        "Largest document, and largest line or row that one stands in; a larger one is refused.",
        ge=1,
        resumable=True,
    )
    max_field_lines: int = knob(
        200,
        "`csv`: a quoted field of as many lines is refused, as a quotation mark that is not closed; so is one of a "
        "tenth as many that look like rows.",
        ge=1,
        resumable=True,
    )
    eval_path: str = knob(
        "",
        "Held-out text of the same source and columns; empty holds out the last rows of `path`.",
        resumable="content",
    )
    eval_split: str = knob(
        "", "Held-out split of an `hf` or `tfds` data set; empty holds out the last rows.", resumable="content"
    )
    eval_fraction: float = knob(
        0.02, "Share of the rows that is held out, where no held-out text is named.", ge=0, le=0.5
    )
    prepared: str = knob(
        "", "Folder printed by `jaxdistill prepare`; the keys above are then not used.", resumable="content"
    )
    token_counts: str = knob(
        "",
        "File (.npy or .json) with the count of every token id, for mask.smoothing; empty counts the text itself.",
        resumable="content",
    )
    cache_dir: str = knob(
        "~/.cache/jaxdistill", "Folder for prepared text, stored under a hash of its content.", resumable=True
    )
    max_length: int = knob(128, "Tokens in a row at most, special tokens included.", ge=4)
    min_tokens: int = knob(12, "Rows with fewer tokens are dropped.", ge=3)
    max_unk_fraction: float = knob(
        0.5, "Rows with this share of unknown tokens, or a larger one, are dropped.", ge=0, le=1
    )
    batching: Literal["length", "packed"] = knob(
        "length", "`length`: batches of rows of similar length; `packed`: rows filled with documents end to end."
    )
    buckets: Widths = knob((), "Widths of batches in tokens, the last one max_length; empty chooses up to four widths.")
    threads: int = knob(2, "Threads that read and mask ahead of training.", ge=1, le=1024, resumable=True)
    prefetch: int = knob(16, "Batches that are read ahead.", ge=1, le=2**16, resumable=True)

    @property
    def packed(self) -> bool:
        """Whether rows are filled with documents end to end."""
        return self.batching == "packed"

    def check(self) -> None:
        """Checks the rules between knobs of this section.

        Raises:
          UserError: the first broken rule.
        """
        if not (self.path or self.prepared):
            raise UserError(
                "config.data.path is empty; name a text file, or a folder of `jaxdistill prepare` in data.prepared"
            )
        if not (self.eval_path or self.eval_split or self.eval_fraction):
            raise UserError("config.data.eval_fraction is 0 and no held-out text is named; set it, or data.eval_path")
        if self.buckets and self.buckets[-1] != self.max_length:
            raise UserError(
                f"config.data.buckets={self.buckets!r}: the last must be config.data.max_length={self.max_length}"
            )


class MaskConfig(Section):
    """Which tokens a masked language model predicts (causal models predict every next token)."""

    fraction: float = knob(0.15, "Share of the real tokens that is masked.", ge=0.001, le=1)
    replace: Shares = knob(
        (0.8, 0.1, 0.1), "Shares of the masked tokens that become [MASK], stay as they are, become a random token."
    )
    smoothing: float = knob(
        0.7, "Prefers rare tokens: a token is drawn with weight count ** -smoothing; 0 draws all alike.", ge=0
    )
    group: int = knob(8, "Rows whose masked tokens are drawn together; recipes for causal models set 1.", ge=1)
    epochs: int = knob(
        0,
        "Epochs with masks of their own, after which the same ones come again, so that a teacher cache can hold its "
        "answers: a row's masks are then a function of its tokens, `seed` and the epoch. 0 = new masks in every epoch.",
        ge=0,
        le=2**20,
    )
    seed: int = knob(0, "Seed of the masks where `epochs` is set.", ge=0, le=2**31 - 1)

    def check(self) -> None:
        if self.epochs and self.group != 1:
            raise UserError(
                f"config.mask.epochs={self.epochs} masks every row by itself, and config.mask.group={self.group} masks "
                "rows together; set mask.group to 1"
            )


class CacheConfig(Section):
    """What `jaxdistill cache` keeps of a teacher's answers; see docs/cache.md."""

    kind: Literal["sampled", "topk", "topk+sampled"] = knob(
        "sampled",
        "Of the teacher's distribution over each token: `sampled`, words drawn from it; `topk`, the most likely words "
        "and the probability of all others together; `topk+sampled`, the most likely words, and draws from the others.",
        resumable=True,
    )
    samples: int = knob(
        50,
        "Words drawn for each token; not used by `topk`. Their noise in the gradient falls as their number, or faster, "
        "and grows with the square of the temperature.",
        ge=1,
        le=4096,
        resumable=True,
    )
    k: int = knob(
        32,
        "Most likely words of each token, or the whole vocabulary where that is smaller; not used by `sampled`.",
        ge=1,
        resumable=True,
    )
    dtype: Literal["float16", "float32"] = knob(
        "float16", "Data type of the most likely words' log-probabilities.", resumable=True
    )
    temperatures: tuple[float, ...] = knob(
        (), "Temperatures that a run with the cache may have; empty = loss.temperature.", resumable=True
    )
    layers: tuple[int, ...] = knob(
        (),
        "Teacher layers whose hidden states are kept as well, in bfloat16, counted from 0, -1 being the embeddings.",
        resumable=True,
    )

    def check(self) -> None:
        if not all(0 < t < math.inf for t in self.temperatures):
            raise UserError(f"config.cache.temperatures={self.temperatures} must be numbers above 0")
