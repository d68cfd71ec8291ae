import csv
import gzip
import hashlib
import io
import json
import logging
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from jaxdistill import network
from jaxdistill.data import sources
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.sources import SOURCES
from jaxdistill.data.text import open_source
from jaxdistill.errors import UserError
from jaxdistill.knobs import checked

pytestmark = pytest.mark.newest

DOCUMENTS = ["The first document.", "Ein zweites, größeres …", 'A "quoted" one, with a comma', "last 日本語"]


def opened(path, *, split="", **settings):
    return open_source(DataConfig(**settings), path=str(path), split=split)


def read(path, **settings):
    return list(opened(path, **settings).documents())


def table(documents):
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], *enumerate(documents)])
    return out.getvalue().encode()


def parquet(documents, path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(documents))), "text": documents}), path)


def content(kind, documents):
    if kind == "text":
        return "".join(f"  {document}\r\n\n" for document in documents).encode()
    if kind == "jsonl":
        return "".join(json.dumps({"id": 0, "text": document}) + "\n" for document in documents).encode()
    if kind == "tsv":
        return "".join(f"{id}\t{document}\r\n" for id, document in [("id", "text"), *enumerate(documents)]).encode()
    return table(documents)


def compress(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["text", "csv", "tsv", "jsonl"])
def test_files(tmp_path, kind, suffix):
    path = tmp_path / f"corpus.{kind}{suffix}"
    # Two members, one after the other, are one file for gzip and zstd.
    path.write_bytes(compress(content(kind, DOCUMENTS[:2]), suffix))
    if kind in ("text", "jsonl"):
        with path.open("ab") as file:
            file.write(compress(content(kind, DOCUMENTS[2:]), suffix))
        expected = DOCUMENTS
    else:
        expected = DOCUMENTS[:2]
    source = opened(path, source=kind)
    assert list(source.documents()) == expected
    assert list(source.documents()) == expected, "restartable"
    assert read(path, source=kind, limit=1) == expected[:1]
    assert path.name in source.description


def test_parquet(tmp_path):
    parquet([*DOCUMENTS, None, " "], tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", source="parquet") == DOCUMENTS
    with pytest.raises(UserError, match=r"no column 'body'; it has 'id', 'text'"):
        read(tmp_path / "a.parquet", source="parquet", column="body")
    with pytest.raises(UserError, match="column 'id' holds int, not text"):
        read(tmp_path / "a.parquet", source="parquet", column="id")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body.text": DOCUMENTS, "body": [["a"]] * len(DOCUMENTS)}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", source="parquet", column="body.text") == DOCUMENTS
    with pytest.raises(UserError, match="column 'body' holds list, not text"):
        read(tmp_path / "b.parquet", source="parquet", column="body")


PAIRS = [("First?", 'A "quoted" one, {with} braces'), ("Zweite\nFrage …", "日本語")]
# What is null (blank where a format has no null) or blank on either side is left out.
ROWS = [
    (f" {PAIRS[0][0]} ", PAIRS[0][1]),
    (None, "a"),
    ("b", None),
    (" ", "c"),
    ("d", "\t"),
    (PAIRS[1][0], f"{PAIRS[1][1]}\n"),
]


def one_field(value):
    return "" if value is None else re.sub("[\t\n]", " ", str(value))


def write_pairs(path, kind):
    records = [{"id": 3, "text": completion, "question": prompt} for prompt, completion in ROWS]
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "tsv":  # which has neither line ends nor tabs in a field
        rows = [list(records[0]), *(map(one_field, record.values()) for record in records)]
        path.write_text("".join("\t".join(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_pairs(tmp_path, kind):
    path = write_pairs(tmp_path / f"a.{kind}", kind)
    pairs = [tuple(map(one_field, pair)) for pair in PAIRS] if kind == "tsv" else PAIRS
    source = opened(path, source=kind, prompt_column="question")
    assert list(source.documents()) == pairs
    assert list(source.documents()) == pairs, "restartable"
    assert read(path, source=kind, prompt_column="question", limit=1) == pairs[:1]
    with pytest.raises(UserError, match=r"no column 'Q'; it has 'id', 'text', 'question'; set data\.prompt_column$"):
        read(path, source=kind, prompt_column="Q")
    with pytest.raises(UserError, match=r"no column 'Q'; it has 'id', 'text', 'question'; set data\.column$"):
        read(path, source=kind, column="Q", prompt_column="question")
    if kind in ("jsonl", "parquet"):
        with pytest.raises(UserError, match="column 'id' holds int, not text"):
            read(path, source=kind, prompt_column="id")


def test_text_has_no_prompt_column(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"data\.prompt_column='q': data\.source='text' has no columns"):
        opened(tmp_path / "a.txt", prompt_column="q")


def test_fingerprint_covers_the_prompt_column_only_where_there_is_one(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", "jsonl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    old = hashlib.sha256(json.dumps(["jsonl", "text", [["", digest]]]).encode()).hexdigest()
    assert opened(path, source="jsonl").fingerprint == old, "prepared folders of earlier versions are found again"
    found = {
        opened(path, source="jsonl", column=column, prompt_column=prompt).fingerprint
        for column, prompt in (("text", ""), ("text", "question"), ("question", "text"), ("text", "id"))
    }
    assert len(found) == 4 and old in found


def test_globs_lists_and_doubles(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "[1],x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"in {name}\n")
    assert read(tmp_path / "[ab].txt") == ["in a.txt", "in b.txt"]
    assert read(f"{tmp_path}/b.txt, {tmp_path}/*.txt,{tmp_path}/deep/../a.txt") == [
        "in [1],x.txt",
        "in a.txt",
        "in b.txt",
    ]
    assert read(tmp_path / "**" / "c.txt") == ["in deep/c.txt"]
    assert read(tmp_path / "[1],x.txt") == ["in [1],x.txt"], "a name that exists is literal"


# Two files with a byte-order mark each, one after the other, and the same with line ends of old Macs.
JOINED = {
    "text": "\ufeff{}\n\ufeff{}\n",
    "csv": "\ufefftext\n{}\n\ufeff{}\n",
    "tsv": "\ufefftext\n{}\n\ufeff{}\n",
    "jsonl": '\ufeff{{"text": "{}"}}\n\ufeff{{"text": "{}"}}\n',
    "json": '\ufeff[{{"text": "{}"}},\n {{"text": "{}"}}]\n',
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", JOINED)
def test_byte_order_marks_and_line_ends_are_no_text(tmp_path, kind, end):
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress(JOINED[kind].format("the cat", "the dög").replace("\n", end).encode()))
    assert read(tmp_path / "*.gz", source="jsonl" if kind == "json" else kind) == ["the cat", "the dög"]


def test_a_lone_carriage_return_is_a_letter_where_lines_end_otherwise(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the\rcat\nthe dog\n")
    assert read(tmp_path / "a.txt") == ["the\rcat", "the dog"]


TSV = {
    "opens one row and closes another": [
        '"Good morning, said the cat',
        "the dog sees a bird",
        'the bird hears the dog"',
    ],
    "never closed": ['"Good morning', "the dog"],
    "doubled": ['""', 'a "" b', '"the cat"'],
    "a quoted word first": ['"Good" morning', "never"],
}


@pytest.mark.parametrize("case", TSV)
@pytest.mark.parametrize("form", ["{}\t{}", "{1}\t{0}"])
def test_a_quotation_mark_in_tsv_is_a_letter(tmp_path, case, form):
    rows = [("id", "text"), *enumerate(TSV[case])]
    (tmp_path / "a.tsv").write_text("".join(form.format(*row) + "\n" for row in rows))
    assert read(tmp_path / "a.tsv", source="tsv") == TSV[case]


def test_only_files_that_were_read_otherwise_get_another_fingerprint(tmp_path):
    """What was prepared from ordinary tsv and text is found again."""
    for name, data, source, is_known in (
        ("a.tsv", b"text\nthe cat\n", "tsv", True),
        ("b.tsv", b'text\n"the cat"\n', "tsv", False),
        ("a.txt", b"the cat\nthe\rdog\r\n", "text", True),
        ("b.txt", b"the cat\rthe dog", "text", False),
    ):
        (tmp_path / name).write_bytes(data)
        settings = [source, "text" if source == "tsv" else "", [["", hashlib.sha256(data).hexdigest()]]]
        old = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        assert (opened(tmp_path / name, source=source).fingerprint == old) == is_known, name


def test_a_csv_field_that_swallows_rows_is_refused_with_its_first_line(tmp_path):
    """A quotation mark opens in line 3, and another one closes in the last."""
    rows = ["id,text", "0,fine", '1,"Good morning, said the cat', *["2,the dog sees a bird"] * 30, '3,the bird"']
    (tmp_path / "a.csv").write_text("\n".join(rows))
    with pytest.raises(
        UserError, match=r"a.csv' line 3: a quotation mark .* swallows the 20 lines .*max_field_lines=200"
    ):
        read(tmp_path / "a.csv", source="csv")
    poem = "\n".join(["The cat, the dog, and the bird", "went to sea,"] * 90)
    (tmp_path / "a.csv").write_bytes(table(["fine", poem, "fine"]))
    assert read(tmp_path / "a.csv", source="csv") == ["fine", poem, "fine"]
    (tmp_path / "a.csv").write_bytes(table(["fine", f"{poem}\n{poem}"]))
    with pytest.raises(UserError, match=r"line 3: a quotation mark .* swallows the 200 lines"):
        read(tmp_path / "a.csv", source="csv")
    assert read(tmp_path / "a.csv", source="csv", max_field_lines=1000) == ["fine", f"{poem}\n{poem}"]
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,a\n2,"b\n3,c\n')
    with pytest.raises(UserError, match=r"line 3: unexpected end of data"):
        read(tmp_path / "a.csv", source="csv")


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects(tmp_path, monkeypatch, indent, block):
    monkeypatch.setattr("jaxdistill.data.readers._BLOCK", max(block, 2))
    records = [{"id": i, "text": document, "more": [{"a": []}]} for i, document in enumerate(DOCUMENTS)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*records, {"id": 3}, {"text": None}], indent=indent, ensure_ascii=bool(indent)))
    assert read(path, source="jsonl") == DOCUMENTS
    path.write_text(" [ ] \n")
    assert read(path, source="jsonl") == []


def test_json_lines_without_the_key_are_as_null(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"text": "the cat"}\n{"id": 2}\n{"text": null}\n{"text": "the dog", "q": "?"}\n')
    assert read(path, source="jsonl") == ["the cat", "the dog"]
    assert read(path, source="jsonl", prompt_column="q") == [("?", "the dog")]
    monkeypatch.setattr("jaxdistill.data.readers.RECORDS_WITHOUT_KEY", 3)
    with pytest.raises(
        UserError, match=r"in its first 3 records: no column 'q'; it has 'id', 'text'; set data.prompt_c"
    ):
        read(path, source="jsonl", prompt_column="q")


LONG = "the cat and " * 100  # 1,199 bytes without the white space at its end


@pytest.mark.parametrize("kind", ["text", "csv", "tsv", "jsonl", "json", "parquet", "hf", "hf streamed", "saved"])
def test_a_document_above_the_limit_is_refused(tmp_path, hub, kind):
    source, _, how = kind.partition(" ")
    path = {"hf": hub, "saved": tmp_path / "saved"}.get(source, tmp_path / f"a.{kind}")
    if kind == "parquet":
        parquet(["fine", LONG], path)
    elif kind == "saved":
        pytest.importorskip("datasets").Dataset.from_dict({"text": ["fine", LONG]}).save_to_disk(path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": "fine"}, {"text": LONG}]))
    else:
        file = hub / "train.jsonl" if source == "hf" else path
        file.write_bytes(content("jsonl" if source == "hf" else kind, ["fine", LONG]))
    settings = {"source": {"json": "jsonl", "saved": "hf"}.get(source, source), "streaming": bool(how)}
    assert read(path, **settings, max_document_bytes=2000) == ["fine", LONG.strip()]
    with pytest.raises(UserError, match=r"is larger than config\.data\.max_document_bytes=1,000; .* larger limit"):
        read(path, **settings, max_document_bytes=1000)


# (how the file is written, how it is named): one document of 64 MB, which takes next to nothing on disk.
BOMBS = {
    "a line": (lambda path: path.write_bytes(gzip.compress(b"the cat " * 2**23, 1)), "text", "a.txt.gz"),
    "a row": (lambda path: path.write_bytes(gzip.compress(b'text\n"' + b"cat\n" * 2**24, 1)), "csv", "a.csv.gz"),
    "an item": (lambda path: path.write_bytes(gzip.compress(b'[{"text": "' + b"cat " * 2**24, 1)), "jsonl", "a.gz"),
    "a cell among small ones": (
        lambda path: parquet(["fine"] * 10**4 + ["the cat " * 2**23], path),
        "parquet",
        "a.parquet",
    ),
    "a cell in a dictionary": (
        lambda path: parquet(["the cat " * 2**23] + ["fine"] * 10**4, path),
        "parquet",
        "a.parquet",
    ),
    "a cell": (lambda path: parquet(["fine", "the cat " * 2**23], path), "parquet", "a.parquet"),
}

BOUNDED = """
import resource, sys
from jaxdistill.data import sources
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.text import open_source
from jaxdistill.errors import UserError
import pyarrow.parquet
settings = dict(source=sys.argv[1], max_document_bytes=2**20, max_field_lines=10**9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(open_source(DataConfig(**settings), path=sys.argv[2], split="").documents())
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


# Each is a process of its own, so the fast part has one.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if i == 0 else pytest.mark.slow) for i, case in enumerate(BOMBS)]
)
def test_a_document_above_the_limit_is_never_in_memory(tmp_path, case):
    write, source, name = BOMBS[case]
    write(tmp_path / name)
    command = [sys.executable, "-c", BOUNDED, source, str(tmp_path / name)]
    kilobytes, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert "is larger than config.data.max_document_bytes=1,048,576" in said
    assert int(kilobytes) < 32_000


def test_rows_that_share_a_large_cell_are_not_in_memory_together(tmp_path, monkeypatch):
    """Parquet stores such a cell once, as an entry of the column's dictionary."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([LONG * 100]))
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet", store_schema=False)
    sizes = []
    monkeypatch.setattr("jaxdistill.data.readers._BATCH_BYTES", 10**6)
    monkeypatch.setattr(
        "jaxdistill.data.readers.rows_of_table", lambda table, *_, **__: sizes.append(table.nbytes) or []
    )
    assert read(tmp_path / "a.parquet", source="parquet") == []
    assert len(sizes) > 1 and max(sizes) < 1.1 * 10**6


def test_the_limit_of_a_document_is_inclusive(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() * 5 + b"\r\n" + "é".encode() * 5)
    assert read(tmp_path / "a.txt", max_document_bytes=10) == ["ééééé"] * 2
    with pytest.raises(UserError, match=r"a.txt' line 1 is larger than .*=9;"):
        read(tmp_path / "a.txt", max_document_bytes=9)


def test_large_and_multiline_csv_fields(tmp_path):
    documents = ["long " * 100_000 + "end", "two\nlines"]
    (tmp_path / "a.csv").write_bytes(table(documents))
    assert read(tmp_path / "a.csv", source="csv") == documents


def test_fingerprint_is_of_content_and_settings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": "two"}\n')
    first = opened(path, source="jsonl").fingerprint
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    assert opened(moved, source="jsonl").fingerprint == first
    others = {
        opened(path, source="jsonl", column="other").fingerprint,
        opened(path, source="jsonl", limit=1).fingerprint,
        opened(path, source="jsonl", limit=2).fingerprint,
        opened(path, source="text").fingerprint,
        opened(f"{path},{moved}", source="jsonl").fingerprint,
    }
    path.write_text('{"text": "One", "other": "two"}\n')  # the same length
    others.add(opened(path, source="jsonl").fingerprint)
    assert len(others) == 6 and first not in others
    assert opened(moved, source="text").fingerprint == opened(moved, source="text", column="x").fingerprint


BIG = b"".join(b"%d some text that compresses\n" % i for i in range(20_000))

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 440449768\n"

BAD_FILES = {
    "NUL byte": ("text", "a.txt", b"fine\nGIF\x00\x01", r"a.txt' is binary.* offset 8"),
    "not UTF-8": ("text", "a.txt", "fine\nna\u00efve\n".encode("latin-1"), r"a.txt' .*0xef at offset 7"),
    "UTF-16": ("text", "a.txt", "hello".encode("utf-16"), r"a.txt' is binary.* offset 3"),
    "empty file": ("text", "a.txt", b"", r"a.txt' is empty"),
    "truncated gz": ("text", "a.txt.gz", gzip.compress(BIG)[:-30], r"a.txt.gz': Truncated compressed"),
    "damaged gz": ("text", "a.txt.gz", gzip.compress(b"x")[:-8] + b"12345678", r"a.txt.gz': .*incorrect"),
    "not gz": ("text", "a.txt.gz", b"plain text", r"a.txt.gz': .*incorrect header"),
    "not zst": ("text", "a.txt.zst", b"plain text", r"a.txt.zst': "),
    "broken JSON": ("jsonl", "a.jsonl", b'{"text": "a"}\n\n{"text": ', r"line 3 is not JSON"),
    "deep JSON": ("jsonl", "a.jsonl", b"[" * 100_000 + b"\n", r"line 1 is not JSON"),
    "JSON list": ("jsonl", "a.jsonl", b'["text"]\n', r"line 1 is a JSON str"),
    "JSON column": ("jsonl", "a.jsonl", b'{"a": "a"}\n{"b": 1}\n', r"a.jsonl': no column 'text'; .*'a', 'b'; set data"),
    "JSON number alone": ("jsonl", "a.jsonl", b'{"text": "a"}\n3\n', r"line 2 is a JSON int"),
    "open array": ("jsonl", "a.json", b'[\n{"text": "a"},\n{"text": "b"}\n', r"line 4 is not JSON: ',' or ']' must"),
    "cut array": ("jsonl", "a.json", b'[\n{"text": "a"},\n{"text": "b', r"line 3 is not JSON: Unterminated"),
    "array without commas": ("jsonl", "a.json", b'[{"text": "a"} {"text": "b"}]', r"line 1 is not JSON: ',' or ']'"),
    "array with a last comma": ("jsonl", "a.json", b'[{"text": "a"},\n]', r"line 2 is not JSON: a comma before"),
    "text after an array": ("jsonl", "a.json", b'[{"text": "a"}]\n3', r"line 2 is not JSON: text after the end"),
    "array of arrays": ("jsonl", "a.json", b'[[{"text": "a"}]]', r"line 1 is a JSON list; each line, or item"),
    "array column": ("jsonl", "a.json", b'[{"a": "a"}]', r"a.json': no column 'text'; it has 'a'"),
    "array not UTF-8": ("jsonl", "a.json", b'[{"text": "\xef"}]', r"a.json' is not UTF-8"),
    "ragged tsv": ("tsv", "a.tsv", b"id\ttext\n1\ta\n2\tb\tc\n", r"line 3: 3 fields where the header has 2"),
    "LFS pointer": ("text", "a.txt", LFS, r"a.txt is a git-lfs pointer.*: run `git lfs pull`"),
    "LFS pointer of a gz": ("text", "a.txt.gz", LFS, r"is a git-lfs pointer"),
    "LFS pointer of a Parquet file": ("parquet", "a.parquet", LFS, r"is a git-lfs pointer"),
    "JSON number": ("jsonl", "a.jsonl", b'{"text": 3}\n', r"line 1: column 'text' holds int"),
    "JSON surrogate": ("jsonl", "a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: .*is not valid Unicode"),
    "ragged csv": ("csv", "a.csv", b"id,text\n1,a\n2,b,c\n", r"line 3: 3 fields where the header has 2"),
    "short csv": ("csv", "a.csv", b"id,text\n1\n", r"line 2: 1 fields"),
    "open quote": ("csv", "a.csv", b'id,text\n1,"a\n2,b\n', r"unexpected end of data"),
    "csv column": ("csv", "a.csv", b"id,body\n1,a\n", r"no column 'text'; it has 'id', 'body'"),
    "doubled csv column": ("csv", "a.csv", b"text,text\n1,a\n", r"a.csv': 2 columns are named 'text'; rename"),
    "doubled tsv column": ("tsv", "a.tsv", b"text\tid\ttext\n1\t2\ta\n", r"a.tsv': 2 columns are named 'text'"),
    "csv header": ("csv", "a.csv", b"\n\n", r"no header"),
    "not parquet": ("parquet", "a.parquet", b"PAR1 no", r"a.parquet' is not a whole Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    kind, name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name, source=kind)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [3, 200, -3])
def test_truncated_zst(tmp_path, cut):
    (tmp_path / "a.zst").write_bytes(compress(BIG, ".zst")[:cut])
    with pytest.raises(UserError, match=r"a.zst': Truncated compressed"):
        read(tmp_path / "a.zst")


def test_truncated_parquet(tmp_path):
    parquet(DOCUMENTS, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a.parquet'"):
        read(tmp_path / "a.parquet", source="parquet")


def test_bad_paths_and_settings(tmp_path):
    with pytest.raises(UserError, match=r"no such file: '.*missing.txt'"):
        opened(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"no file matches '.*\*.txt'"):
        opened(tmp_path / "*.txt")
    with pytest.raises(UserError, match=r"is a folder; give its files"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"data\.path is empty"):
        opened("")
    with pytest.raises(UserError, match=r"source='texts': must be one of text, csv"):
        checked(DataConfig, {"source": "texts"})
    with pytest.raises(UserError, match="limit=-1"):
        checked(DataConfig, {"limit": -1})
    assert list(SOURCES) == ["text", "csv", "tsv", "jsonl", "parquet", "hf", "tfds"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local folder with a dataset; nothing is written outside of tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(content("jsonl", DOCUMENTS))
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_folder(hub, streaming):
    source = opened(hub, source="hf", streaming=streaming)
    assert list(source.documents()) == DOCUMENTS
    assert list(source.documents()) == DOCUMENTS, "restartable"
    assert read(hub, source="hf", streaming=streaming, limit=2) == DOCUMENTS[:2]
    assert source.fingerprint == opened(hub, source="hf", streaming=streaming).fingerprint
    assert source.fingerprint != opened(hub, source="hf", streaming=streaming, column="text", limit=1).fingerprint
    with pytest.raises(UserError, match=r"no column 'body'; it has 'id', 'text'"):
        opened(hub, source="hf", streaming=streaming, column="body")
    with pytest.raises(UserError, match=r"split 'nope'.*train"):
        opened(hub, source="hf", streaming=streaming, split="nope")


def test_what_save_to_disk_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    first, rest = (datasets.Dataset.from_dict({"id": [0, 1], "text": part}) for part in (DOCUMENTS[:2], DOCUMENTS[2:]))
    first.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": first, "validation": rest}).save_to_disk(tmp_path / "two")
    for path in (tmp_path / "one", tmp_path / "two"):
        source = opened(path, source="hf")
        assert list(source.documents()) == DOCUMENTS[:2] == read(path, source="hf", streaming=True)
        assert list(source.documents()) == DOCUMENTS[:2], "restartable"
        assert list(opened(path, source="hf", split="train[1:]").documents()) == DOCUMENTS[1:2]
        assert opened(path, source="hf", split="train[1:]").fingerprint != source.fingerprint
        with pytest.raises(UserError, match=r"no column 'body'; it has 'id', 'text'"):
            opened(path, source="hf", column="body")
        with pytest.raises(UserError, match=r"split 'nope'.*train"):
            opened(path, source="hf", split="nope")
    assert opened(tmp_path / "one", source="hf").fingerprint == opened(tmp_path / "two", source="hf").fingerprint
    assert list(opened(tmp_path / "two", source="hf", split="validation").documents()) == DOCUMENTS[2:]
    assert list(opened(tmp_path / "two", source="hf", split="train+validation").documents()) == DOCUMENTS
    rest.save_to_disk(tmp_path / "three")
    assert opened(tmp_path / "three", source="hf").fingerprint != opened(tmp_path / "one", source="hf").fingerprint
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot load dataset '.*one'"):
        opened(tmp_path / "one", source="hf")


def test_a_folder_that_is_not_what_it_seems(hub):
    with pytest.raises(UserError, match=r"config\.data\.revision='v1': .* is a local folder; leave it empty"):
        opened(hub, source="hf", revision="v1")
    (hub / "more.txt").write_bytes(LFS)
    with pytest.raises(UserError, match=r"more.txt is a git-lfs pointer"):
        opened(hub, source="hf")


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_pairs(hub, streaming):
    write_pairs(hub / "train.jsonl", "jsonl")
    source = opened(hub, source="hf", streaming=streaming, prompt_column="question")
    assert list(source.documents()) == PAIRS
    assert read(hub, source="hf", streaming=streaming, prompt_column="question", limit=1) == PAIRS[:1]
    assert source.fingerprint != opened(hub, source="hf", streaming=streaming).fingerprint
    turned = opened(hub, source="hf", streaming=streaming, column="question", prompt_column="text")
    assert source.fingerprint != turned.fingerprint
    with pytest.raises(UserError, match=r"no column 'Q'; it has .*; set data\.prompt_column$"):
        opened(hub, source="hf", streaming=streaming, prompt_column="Q")


def test_hugging_face_fingerprint_follows_the_content(hub):
    first = opened(hub, source="hf").fingerprint
    (hub / "train.jsonl").write_bytes(content("jsonl", DOCUMENTS[:3]))
    assert opened(hub, source="hf").fingerprint != first


def test_hugging_face_name_without_network_is_one_line(hub, caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="no-such-owner/no-such-set") as raised,
    ):
        opened("no-such-owner/no-such-set", source="hf")
    assert "\n" not in str(raised.value)
    assert not caplog.records


@pytest.fixture
def tfds_folder(tmp_path):
    """A TFDS dataset on disk, record by record: its own writer needs TensorFlow, its reader does not."""
    np = pytest.importorskip("numpy")
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra tfds")
    writer_module = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.proto import tf_example_pb2

    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    texts = {"text": tfds.features.Text(), "question": tfds.features.Text()}
    features = tfds.features.FeaturesDict({**texts, "n": tfds.features.Scalar(np.int64)})
    features.save_config(folder)
    writer = writer_module.ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for number, document in enumerate(DOCUMENTS):
        example = tf_example_pb2.Example()
        example.features.feature["text"].bytes_list.value.append(document.encode())
        # The second has a blank one.
        example.features.feature["question"].bytes_list.value.append(b"" if number == 1 else b" What? ")
        example.features.feature["n"].int64_list.value.append(number)
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "numBytes": "100",
        "shardLengths": [str(len(DOCUMENTS))],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(("prepared", "silent"), [(True, True), (False, False), (False, True)])
def test_a_tfds_name_without_a_network_is_refused_at_once(monkeypatch, prepared, silent):
    """What is prepared is read without a network; a download is not begun that would be tried again for minutes."""
    tfds = SimpleNamespace(
        builder=lambda name: SimpleNamespace(is_prepared=lambda: prepared),
        data_source=lambda name, split: (name, split),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setattr(sources, "is_silent", lambda address: silent)
    if prepared or not silent:
        assert sources._load_tfds("a", "a/b", "train", "TFDS dataset 'a/b'") == ("a/b", "train")
    else:
        with pytest.raises(UserError, match=r"^TFDS dataset 'a/b' is not prepared .*, and no network answers"):
            sources._load_tfds("a", "a/b", "train", "TFDS dataset 'a/b'")


def test_tfds_folder(tfds_folder):
    source = opened(tfds_folder, source="tfds")
    assert list(source.documents()) == DOCUMENTS
    assert list(source.documents()) == DOCUMENTS, "restartable"
    assert read(tfds_folder, source="tfds", limit=2) == DOCUMENTS[:2]
    part = opened(tfds_folder, source="tfds", split="train[1:3]")
    assert list(part.documents()) == DOCUMENTS[1:3]
    assert part.fingerprint != source.fingerprint
    with pytest.raises(UserError, match=r"no column 'body'; it has"):
        opened(tfds_folder, source="tfds", column="body")
    with pytest.raises(UserError, match=r"split 'nope'"):
        opened(tfds_folder, source="tfds", split="nope")
    with pytest.raises(UserError, match="column 'n' holds int, not text"):
        read(tfds_folder, source="tfds", column="n")
    with pytest.raises(UserError, match=r"config\.data\.revision='1\.0\.0': .* is a local folder"):
        opened(tfds_folder, source="tfds", revision="1.0.0")


def test_tfds_pairs(tfds_folder):
    source = opened(tfds_folder, source="tfds", prompt_column="question")
    assert list(source.documents()) == [("What?", document) for i, document in enumerate(DOCUMENTS) if i != 1]
    assert source.fingerprint != opened(tfds_folder, source="tfds").fingerprint
    with pytest.raises(UserError, match=r"no column 'Q'; it has .*; set data\.prompt_column$"):
        opened(tfds_folder, source="tfds", prompt_column="Q")


def test_tfds_name_that_does_not_exist(tfds_folder):
    with pytest.raises(UserError, match=r"TFDS dataset 'no_such_set/small:2\.0\.0'") as raised:
        opened("no_such_set", source="tfds", subset="small", revision="2.0.0")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        *((name, "names no file") for name in (",,,", ",", " ", " , ")),
        *(
            (name, "is not a path of this machine")
            for name in ("~nosuchuser/x", "x" * 300, "x/" * 5000, "~nosuchuser,b")
        ),
        ("/dev/zero", "is a device or a pipe"),
        ("/dev/null", "is a device or a pipe"),
    ],
)
def test_names_that_no_text_can_have(path, said):
    with pytest.raises(UserError, match=said):
        opened(path)
    if said.startswith("is not a path"):
        with pytest.raises(UserError, match=said):
            opened(path, source="hf")


@pytest.mark.parametrize("between", ["", "\n", "\r\n", "\ufeff", "\n\ufeff[]\n"])
def test_arrays_that_were_joined(tmp_path, between):
    first, second = json.dumps([{"text": "a"}, {"text": "b"}], indent=1), json.dumps([{"text": "c"}])
    lines = '{"text": "d"}\n{"text": "e"}\n'
    (tmp_path / "a.json").write_text(first + between + second + between + lines)
    assert read(tmp_path / "a.json", source="jsonl") == ["a", "b", "c", "d", "e"]
    (tmp_path / "a.json").write_text(lines + second + "\n")
    assert read(tmp_path / "a.json", source="jsonl") == ["d", "e", "c"]


def test_a_data_set_of_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch):
    from datasets import config
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(network, "PATIENCE", 0.2)
        began = time.monotonic()
        with pytest.raises(UserError, match="give a local folder where there is no network"):
            opened("nobody/nothing", source="hf")
        assert time.monotonic() - began < 5 and not config.HF_HUB_OFFLINE
