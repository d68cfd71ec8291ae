"""A whole run in seconds: text, tokenizer, teacher and recipe, all made here.

Not `tiny`: that name is the families' (tests/models/tiny.py), and pytest imports both by their bare names.
"""

import contextlib
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

TEXT = "the cat dog bird sees hears likes a small big old red green house tree river and near under never"
WORDS = TEXT.split()

RECIPE = """
from jaxdistill.config import base


def get_config(variant=""):
    config = base()
    config.teacher.name = {teacher!r}
    config.data.path = {text!r}
    config.data.cache_dir = {cache!r}
    config.data.max_length = 32
    config.data.min_tokens = 4
    config.data.buckets = (32,)
    config.data.eval_fraction = 0.1
    config.train.steps = 4
    config.train.batch_size = 16
    config.mask.group = 2
    config.evaluate.batches = 2
    config.evaluate.batch_size = 8
    config.log.every = 1
    return config
"""


class Tiny(NamedTuple):
    folder: Path
    text: Path
    teacher: Path
    recipe: Path


def lines(count: int, *, seed: int = 0) -> list[str]:
    """Sentences of 4 to 20 words; each word depends on the word before, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        at, sentence = int(rng.integers(len(WORDS))), []
        for _ in range(rng.integers(4, 21)):
            sentence.append(WORDS[at])
            at = (at * 3 + int(rng.integers(1, 4))) % len(WORDS)
        result.append(" ".join(sentence) + ".")
    return result


def make_tokenizer(texts: Sequence[str]) -> Any:
    import tokenizers
    from transformers import BertTokenizerFast

    wordpiece = tokenizers.BertWordPieceTokenizer()
    wordpiece.train_from_iterator(texts, vocab_size=200, min_frequency=1, show_progress=False)
    frame = [(token, wordpiece.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    wordpiece._tokenizer.post_processor = tokenizers.processors.BertProcessing(*frame)
    return BertTokenizerFast(tokenizer_object=wordpiece._tokenizer)


def write_model(folder: Path, tokenizer: Any, *, kind: str = "bert", seed: int = 0, **fields: Any) -> Path:
    """A random model as a Hugging Face folder, without the zeros of the initialisation, so that every tensor counts."""
    from safetensors.numpy import save_file

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    config, tensors = random_model(kind, seed, json.dumps({**sizes, **fields}))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache  # many files of tests begin with the same model
def random_model(kind: str, seed: int, fields: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The configuration with these fields, in JSON, and all tensors by their names in PyTorch."""
    from tiny import random_params
    from transformers import AutoConfig

    from jaxdistill.models import torch_names
    from jaxdistill.models.model import build_model

    model = build_model(AutoConfig.for_model(kind, **json.loads(fields)))
    return model.config, torch_names.to_torch(random_params(model, np.random.default_rng(seed), 0.1))


def write_text(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in texts))
    return path


def make(folder: Path, *, count: int = 200) -> Tiny:
    texts = lines(count)
    text = write_text(folder / "text.txt", texts)
    teacher = write_model(folder / "teacher", make_tokenizer(texts))
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(teacher=str(teacher), text=str(text), cache=str(folder / "cache")))
    return Tiny(folder, text, teacher, recipe)


def arguments(tiny: Tiny, workdir: Path, **values: Any) -> list[str]:
    """Command line of `jaxdistill train`; `train__steps=3` stands for --config.train.steps=3."""
    return [f"--config={tiny.recipe}", f"--workdir={workdir}", *overrides(**values)]


def overrides(**values: Any) -> list[str]:
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def train(tiny: Tiny, workdir: Path, **values: Any) -> None:
    """`jaxdistill train`, which must succeed."""
    from jaxdistill import train

    assert train.main(arguments(tiny, workdir, **values)) == 0


def call(main: Any, argv: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of an entry point."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


def records(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if kind in (None, record["kind"])]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the figures that depend on the clock."""
    return {k: v for k, v in record.items() if k not in ("time", "tokens_per_s", "input_wait")}


def bits(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder with its bytes (None for folders), to compare before and after."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def saved(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """All arrays of a checkpoint as NumPy, and its notes, read with orbax alone: {"student/...": array, ...}."""
    import orbax.checkpoint as ocp

    folders = {int(path.name): path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    folder = folders[max(folders) if step is None else step]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    result: dict[str, Any] = {"notes": json.loads((folder / "notes" / "metadata").read_text())}
    with ocp.StandardCheckpointer() as reader:
        for item in ("student", "rest"):
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                reader.metadata(folder / item).item_metadata.tree,
            )
            tree = reader.restore(folder / item, shapes)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                result[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return result


def keep_rows(patch: Any, path: Path) -> None:
    """Makes every update add to a file which rows it trains on: a line [step, place in the batch, tokens] for each.

    Of several processes, each writes the rows of its own devices. The tokens are the text's, without masks.
    """
    from jaxdistill.run import training

    make = training.make_train_step

    def make_keeping(*args: Any, **arguments: Any) -> Any:
        step = make(*args, **arguments)

        def keeping(state: Any, teacher: Any, batch: Any, key: Any) -> Any:
            at, names = int(state.step) + 1, ("label_mask", "labels", "input_ids")
            with path.open("a") as file:
                for shards in zip(*(batch[name].addressable_shards for name in names), strict=True):
                    rows = np.where(*(np.asarray(shard.data) for shard in shards))
                    for place, row in enumerate(rows, shards[0].index[0].start or 0):
                        file.write(f"{json.dumps([at, place, row.tolist()])}\n")
            return step(state, teacher, batch, key)

        return keeping

    patch.setattr(training, "make_train_step", make_keeping)


def rows_kept(path: Path) -> dict[tuple[int, int], list[int]]:
    """(step, place in the batch) -> the tokens there. Steps that were computed again after a loss had the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for step, place, row in map(json.loads, path.read_text().splitlines()):
        assert found.setdefault((step, place), row) == row, (step, place)
    return found


def largest_share(params: Any) -> float:
    """The part of all parameters that the device with the most of them holds."""
    leaves = jax.tree.leaves(params)
    held: dict[Any, int] = {}
    for shard in (shard for leaf in leaves for shard in leaf.addressable_shards):
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)


class Stopped(SystemExit):
    """What `stop_after` raises."""


def stop_after(monkeypatch: Any, updates: int) -> None:
    """Makes the train step raise Stopped after so many updates, like a machine that is taken away."""
    from jaxdistill.run import training

    make, left = training.make_train_step, updates

    def make_stopping(*args, **arguments):
        step = make(*args, **arguments)

        def stopping(*inputs):
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            return step(*inputs)

        return stopping

    monkeypatch.setattr(training, "make_train_step", make_stopping)


def assert_same_run(workdir: Path, other: Path) -> None:
    a, b = saved(workdir), saved(other)
    assert a.keys() == b.keys()
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []
    assert a["notes"] == b["notes"]
    assert [untimed(r) for r in records(workdir)] == [untimed(r) for r in records(other)]
