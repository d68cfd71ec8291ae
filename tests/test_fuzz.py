"""Damaged input of every reader: it is read, or refused in one line.

A few inputs for each reader, always the same, unless JAXDISTILL_FUZZ=N asks for N new ones.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS, Reader

from jaxdistill.errors import UserError

EXAMPLES = int(os.environ.get("JAXDISTILL_FUZZ", "0"))

DEEP = ("[" * 3_000 + "]" * 3_000, '{"a":' * 3_000 + "1" + "}" * 3_000)
ODD = st.sampled_from(
    [None, True, -1, 0, 1, 1.5, 2**31, 2**63, 2**70, 1e999, float("nan"), "", "x", "\0", "\ud800", "y" * 9_999, [], {}]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_json(draw: Any, good: Any) -> bytes:
    """A good value with one to three places of it set anew, renamed, removed, or doubled."""
    root = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = root, 0
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        what = draw(st.sampled_from(["value", "value", "value", "name", "gone", "twice"]))
        if what == "name" and isinstance(holder, dict):
            holder[draw(st.text(max_size=9))] = holder.pop(key)
        elif what == "gone" and len(holder) > 1:
            del holder[key]
        elif what == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = draw(VALUES)
    return json.dumps(root[0]).encode()


@st.composite
def damaged_bytes(draw: Any, good: bytes) -> bytes:
    """Good bytes with one to three parts cut out, written over, put in or doubled."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        # Mostly near the beginning, where formats have their headers.
        start = draw(st.integers(0, min(len(data), 64)) | st.integers(0, len(data)))
        stop = min(start + draw(st.integers(0, 16) | st.integers(0, len(data))), len(data))
        new = draw(
            st.binary(max_size=16) | st.sampled_from([b"", b"\0" * 8, b"\xff" * 8, b'"', b"\n", b"{", b"[", b","])
        )
        data[start:stop] = draw(st.sampled_from([new, new, bytes(data[start:stop]) * 2]))
    return bytes(data)


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes like those of a good file; JSON is also damaged by its values."""
    strategies = [damaged_bytes(good), st.binary(max_size=64), st.sampled_from([deep.encode() for deep in DEEP])]
    try:
        value = json.loads(good)
    except ValueError:
        return st.one_of(strategies)
    return st.one_of(damaged_json(value), damaged_json(value), damaged_json(value), *strategies)


def check(read: Callable[[Path], Any], folder: Path) -> None:
    """Reads the folder; any error but a UserError of one short line is one of the test."""
    try:
        read(folder)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error).strip(), repr(str(error))


def fuzz(reader: Reader, folder: Path, *, examples: int) -> None:
    good = folder / "good"
    good.mkdir()
    reader.write(good)
    check(reader.read, good)

    @settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged((good / reader.name).read_bytes()))
    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as copied:
            shutil.copytree(good, copied, dirs_exist_ok=True)
            (Path(copied) / reader.name).write_bytes(data)
            check(reader.read, Path(copied))

    run()


# These stand for all readers in the fast part of the suite.
FAST = (
    *("csv", "jsonl", "safetensors", "shards", "msgpack", "tokenizer_config.json"),
    *("config of a run", "probe", "meta of prepared text", "overrides"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in READERS]
)
def test_any_damage_is_read_or_refused_in_one_line(tmp_path, name):
    fuzz(READERS[name], tmp_path, examples=10)
