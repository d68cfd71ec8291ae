"""Every reader of files and settings as a row: a good input, which fuzzers damage, and the call that reads it.

A reader must return, or raise a UserError of one line, whatever the input is. `test_fuzz.py` damages inputs with
hypothesis, and `scripts/fuzz.py` with atheris.
"""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import tiny_causal
import tiny_run

from jaxdistill import config as configs
from jaxdistill import recipe
from jaxdistill.config import Config
from jaxdistill.data import teacher_cache as caches
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.store import load_token_counts, open_store
from jaxdistill.data.text import open_source
from jaxdistill.models import hub, torch_names, weights
from jaxdistill.models.model import build_model, param_shapes
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer
from jaxdistill.run import checkpoint, writers
from jaxdistill.run import folder as folders
from jaxdistill.sampling.write import read_prompts


class Reader(NamedTuple):
    """How one kind of input is made and read."""

    name: str  # of the file in the folder
    write: Callable[[Path], None]  # puts all files of a good folder into an empty one
    read: Callable[[Path], Any]  # reads the folder


def _put(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


# Text


def _text(source: str, name: str, data: bytes) -> Reader:
    settings = DataConfig(source=source, column="text", path="text")

    def read(folder: Path) -> None:
        list(open_source(settings, path=str(folder / name), split="").documents())

    return Reader(name, _put(name, data), read)


_LINES = "\n".join(["the cat sees a dog", "a bird hears the river", "é ☃ the tree", "near the house"])
_CSV = 'id,text\n1,"the cat, and ""a dog"""\n2,"a bird\nnear the river"\n3,the tree\n'
_RECORDS = [{"id": i, "text": line} for i, line in enumerate(_LINES.split("\n"))]


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [1, 2, 3, 4], "text": _LINES.split("\n")})
    with io.BytesIO() as file:
        pq.write_table(table, file)
        return file.getvalue()


def _zst(data: bytes) -> bytes:
    import pyarrow as pa

    return pa.Codec("zstd").compress(data, asbytes=True)


# Model folders


def _model(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        tiny.config(kind).save_pretrained(folder)
        save_file(torch_names.to_torch(tiny.params(kind)), folder / "model.safetensors")

    return write


def _flax_model(folder: Path) -> None:
    from flax.serialization import msgpack_serialize

    tiny.config("bert").save_pretrained(folder)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tiny.params("bert")))


def _sharded_model(folder: Path) -> None:
    _model("bert")(folder)
    (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
    names = dict.fromkeys(torch_names.to_torch(tiny.params("bert")), "model-1-of-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _pickled_model(folder: Path) -> None:
    import torch

    tiny.config("bert").save_pretrained(folder)
    tensors = {name: torch.tensor(x) for name, x in torch_names.to_torch(tiny.params("bert")).items()}
    torch.save(tensors, folder / "pytorch_model.bin")


def _read_config(folder: Path) -> None:
    param_shapes(build_model(hub.load_config(folder)))


def _read_weights(folder: Path) -> None:
    weights.load_params(folder, tiny.model("bert"), allow_pickle=True)


def _tokenizer(make: Callable[[list[str]], Any], kind: str, *, without: tuple[str, ...] = ()) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        make(tiny_run.lines(20)).save_pretrained(folder)
        tiny.config(kind, vocab_size=300).save_pretrained(folder)
        for name in without:
            (folder / name).unlink()

    return write


_WORDPIECE = _tokenizer(tiny_run.make_tokenizer, "bert")
_WORDPIECE_ALONE = _tokenizer(tiny_run.make_tokenizer, "bert", without=("tokenizer.json",))
_BPE_ALONE = _tokenizer(tiny_causal.make_tokenizer, "gpt2", without=("tokenizer.json",))


def _read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, hub.load_config(folder))
    tokenizer(["the cat sees a dog", ""])


# Run folders, prepared text and settings


def _run_folder(folder: Path) -> None:
    (folder / "config.json").write_text(configs.to_json(Config()))
    rows = {"input_ids": [[5, 6, 7]] * 2, "attention_mask": [[True, True, False]] * 2}
    (folder / "probe.json").write_text(json.dumps(rows))
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 0.5, "kind": "train", "loss": 1.5}\n' * 3)


def _read_run_config(folder: Path) -> None:
    recorded = folders.read_config(folder)
    assert recorded is not None
    configs.differences(recorded, Config())
    recipe.recorded(recorded, [])


def _read_metrics(folder: Path) -> None:
    _, close = writers.jsonl(folder / "metrics.jsonl", resume_at=1)
    close()


_STUDENT = {"dense": {"kernel": np.ones((4, 6), np.float32), "bias": np.zeros(6, np.float32)}}


def _checkpoint(folder: Path) -> None:
    with checkpoint.open_manager(folder) as manager:
        student = jax.tree.map(jnp.asarray, _STUDENT)
        checkpoint.save(manager, 3, {"student": student}, notes={"figures": {"loss": 0.5}}, metrics=None)
        checkpoint.finish(manager)


def _read_checkpoint(folder: Path) -> None:
    with checkpoint.open_manager(folder, read_only=True) as manager:
        checkpoint.restore(manager, {"student": _STUDENT}, report=lambda line: None, read_only=True)


def _prepared(folder: Path) -> None:
    from jaxdistill.data.prepare import prepare

    (folder / "text.txt").write_text("\n".join(tiny_run.lines(20)))
    data = DataConfig(path=str(folder / "text.txt"), cache_dir=str(folder / "cache"), min_tokens=3, max_length=32)
    tokenizer = tiny_run.make_tokenizer(tiny_run.lines(20))
    made = prepare(data, open_source(data, path=data.path, split=""), tokenizer, causal=True, report=lambda line: None)
    for file in made.iterdir():
        shutil.copy(file, folder / file.name)
    shutil.rmtree(folder / "cache")


def _read_prepared(folder: Path) -> None:
    store = open_store(folder)
    for row in range(len(store)):
        store[row]


def _teacher_cache(folder: Path) -> None:
    meta = caches.Meta(kind="sampled", tokens="all", words=9, temperatures=(1.0,), samples=2, causal=False)
    caches.write_meta(folder, meta)
    ids = np.arange(4)
    caches.write_shard(
        folder,
        "shard-000-00000",
        keys=[caches.key_of(ids, ids > 0)],
        lengths=[4],
        counts=[3],
        columns={"samples": np.zeros((3, 1, 2), "<u2"), "floors": np.zeros((3, 1), "<f2")},
    )


def _read_teacher_cache(folder: Path) -> None:
    cache = caches.open_cache(folder)
    for place in cache.places.tolist():
        cache.read((place[0], place[1]), "samples")


def _counts(folder: Path) -> None:
    np.save(folder / "counts.npy", np.arange(9))


def _recipe(folder: Path) -> None:
    (folder / "recipe.py").write_text(
        "from jaxdistill.config import base\n\n\ndef get_config(variant=''):\n    config = base()\n"
        "    config.teacher.name = 'teacher'\n    config.data.path = 'text'\n    return config\n"
    )
    (folder / "overrides").write_text(
        "train.steps=3\nstudent.layers=[0,2]\nloss.end={'temperature': 1.0}\nstudent.overrides={'hidden_size': 8}\n"
        "data.buckets=(32,128)\nmask.replace=(0.8,0.1,0.1)\ntrain.freeze=('a.*',)\nteacher.name=x\n"
    )


def _read_overrides(folder: Path) -> None:
    lines = (folder / "overrides").read_bytes().decode(errors="surrogateescape").split("\n")
    recipe.read(str(folder / "recipe.py"), [f"--config.{line}" for line in lines if line])


READERS: dict[str, Reader] = {
    **{
        f"{name} of a teacher cache": Reader(name, _teacher_cache, _read_teacher_cache)
        for name in ("meta.json", "shard-000-00000/shard.json", "shard-000-00000/counts.bin")
    },
    "text": _text("text", "x.txt", _LINES.encode()),
    "gzip": _text("text", "x.txt.gz", gzip.compress(_LINES.encode(), mtime=0)),
    "zstd": _text("text", "x.txt.zst", _zst(_LINES.encode())),
    "csv": _text("csv", "x.csv", _CSV.encode()),
    "tsv": _text("tsv", "x.tsv", _CSV.replace(",", "\t").encode()),
    "jsonl": _text("jsonl", "x.jsonl", "\n".join(map(json.dumps, _RECORDS)).encode()),
    "json": _text("jsonl", "x.json", json.dumps(_RECORDS, indent=1).encode()),
    "parquet": _text("parquet", "x.parquet", _parquet()),
    **{
        f"config of {kind}": Reader(
            "config.json", lambda f, kind=kind: tiny.config(kind).save_pretrained(f), _read_config
        )
        for kind in ("bert", "gpt_neo", "llama", "gemma3_text", "modernbert")
    },
    "safetensors": Reader("model.safetensors", _model("bert"), _read_weights),
    "shards": Reader("model.safetensors.index.json", _sharded_model, _read_weights),
    "msgpack": Reader("flax_model.msgpack", _flax_model, _read_weights),
    "pickle": Reader("pytorch_model.bin", _pickled_model, _read_weights),
    "tokenizer.json": Reader("tokenizer.json", _WORDPIECE, _read_tokenizer),
    "tokenizer_config.json": Reader("tokenizer_config.json", _WORDPIECE, _read_tokenizer),
    "special_tokens_map.json": Reader("special_tokens_map.json", _WORDPIECE, _read_tokenizer),
    "vocab.txt": Reader("vocab.txt", _WORDPIECE_ALONE, _read_tokenizer),
    "vocab.json": Reader("vocab.json", _BPE_ALONE, _read_tokenizer),
    "merges.txt": Reader("merges.txt", _BPE_ALONE, _read_tokenizer),
    "config of a run": Reader("config.json", _run_folder, _read_run_config),
    "probe": Reader("probe.json", _run_folder, lambda f: folders._read_probe(f / "probe.json", tiny.model("bert"))),
    "metrics": Reader("metrics.jsonl", _run_folder, _read_metrics),
    **{
        f"{name} of a checkpoint": Reader(f"checkpoints/3/{name}", _checkpoint, _read_checkpoint)
        for name in ("_CHECKPOINT_METADATA", "notes/metadata", "student/_METADATA", "student/manifest.ocdbt")
    },
    "meta of prepared text": Reader("meta.json", _prepared, _read_prepared),
    "tokens of prepared text": Reader("tokens.bin", _prepared, _read_prepared),
    "offsets of prepared text": Reader("offsets.npy", _prepared, _read_prepared),
    "documents of prepared text": Reader("documents.npy", _prepared, _read_prepared),
    "token counts": Reader("counts.npy", _counts, lambda folder: load_token_counts(folder / "counts.npy")),
    "token counts in JSON": Reader("c.json", _put("c.json", b"[1, 2, 3]"), lambda f: load_token_counts(f / "c.json")),
    "prompts": Reader("p.jsonl", _put("p.jsonl", b'{"prompt": "the cat"}\n'), lambda f: read_prompts(f / "p.jsonl")),
    "overrides": Reader("overrides", _recipe, _read_overrides),
}
