"""`jaxdistill export --push`: what goes to the hub, by a stand-in for it on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tiny_run
from huggingface_hub import ModelCard

from jaxdistill import cli
from jaxdistill.export.card import Card, Results, model_card
from jaxdistill.export.origin import Origin, Source

SCRIPT = """
import sys
from pathlib import Path
from jaxdistill.errors import UserError
from jaxdistill.export.push import Target, check_access, push
target = Target(sys.argv[2], private=sys.argv[3] == "private")
try:
    print(check_access(target))
    print(push(Path(sys.argv[1]), target))
except UserError as error:
    sys.exit(f"error: {error}")
"""


REGULAR = 10_000_000  # bytes up to which a file goes with the commit itself; a larger one goes to LFS first
PART = 4_000_000  # bytes of each part of an upload in parts


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client asks for: files in the commit itself, and through LFS, whole or in parts.

    `refuses` answers that the token may not write, `in_parts` takes large files in parts, and `is_full` takes none.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.stored: dict[str, list[bytes]] = {}  # of LFS: oid -> parts
        self.verified: list[dict[str, Any]] = []
        self.refuses = self.in_parts = self.is_full = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: standard error is the test's."""

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if "/api/models/" in self.path:  # asked after a refusal: whether the repository is there already
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"name": "someone", "type": "user", "auth": {}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.chunk, b""))
        if self.path.endswith("/repos/create"):
            if self.server.refuses:
                return self.answer({"error": "You don't have the rights"}, 403)
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/someone/tiny"})
        if "/preupload/" in self.path:
            return self.answer({"files": list(map(self.preupload, json.loads(body)["files"]))})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)
            assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
            way = "multipart" if self.server.in_parts else "basic"
            assert way in asked["transfers"]
            return self.answer({"transfer": way, "objects": list(map(self.actions, asked["objects"]))})
        if self.path.startswith("/lfs/"):  # all parts have come
            data = self.server.stored[self.path.split("/")[2]]
            etags = [f'"{i}"' for i in range(1, len(data) + 1)]
            assert [one["etag"] for one in json.loads(body)["parts"]] == etags
            return self.answer({})
        if self.path == "/verify":
            self.server.verified.append(json.loads(body))
            return self.answer({})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    data = b"".join(self.server.stored[line["value"]["oid"]])
                    assert hashlib.sha256(data).hexdigest() == line["value"]["oid"]
                    self.server.files[line["value"]["path"]] = data
            return self.answer({"commitUrl": f"{self.server.address}/someone/tiny/commit/1", "commitOid": "1"})
        return self.answer({"errors": [], "warnings": []})  # validate-yaml

    def do_PUT(self) -> None:
        """A file of LFS, or a part of one; the store takes no token, as the address that it was given is signed."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.is_full:
            return self.answer({"error": "no space"}, 507)
        assert "Authorization" not in self.headers
        _, _, oid, part = self.path.split("/")
        parts = self.server.stored.setdefault(oid, [])
        parts.extend([b""] * (int(part) - len(parts)))
        parts[int(part) - 1] = data
        return self.answer({}, headers={"ETag": f'"{part}"'})

    def preupload(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] > REGULAR else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def actions(self, file: dict[str, Any]) -> dict[str, Any]:
        """Where the client sends a file of LFS."""
        store = f"{self.server.address}/lfs/{file['oid']}"
        upload: dict[str, Any] = {"href": f"{store}/1"}
        if self.server.in_parts:
            count = -(-file["size"] // PART)
            upload = {"href": store, "header": {"chunk_size": str(PART)}}
            upload["header"] |= {str(i): f"{store}/{i}" for i in range(1, count + 1)}
        return {**file, "actions": {"upload": upload, "verify": {"href": f"{self.server.address}/verify"}}}

    def chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def answer(self, value: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pushed(hub: Hub, folder: Path, visibility: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads the address and whether it is offline where it is imported."""
    here = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), "someone/tiny", visibility],
        capture_output=True,
        text=True,
        env={**os.environ, **here, "HF_HOME": str(folder.parent / "home")},
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["private", "public"])
def test_a_folder_goes_to_the_hub_file_by_file(hub: Hub, visibility: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# card\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(REGULAR + 1))  # through LFS
    hub.in_parts = visibility == "public"
    done = pushed(hub, folder, visibility)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone", f"{hub.address}/someone/tiny"]
    assert [one.get("private", False) for one in hub.created] == [visibility == "private"]
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == {"Bearer hf_secret"}
    [(oid, parts)] = hub.stored.items()
    assert len(parts) == (3 if hub.in_parts else 1)
    assert [(one["oid"], one["size"]) for one in hub.verified] == [(oid, REGULAR + 1)]


@pytest.mark.slow
def test_a_store_of_large_files_that_takes_none_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.is_full = True
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(bytes(REGULAR + 1))
    done = pushed(hub, tmp_path / "student", "private")
    assert done.returncode == 1 and hub.files == {}
    assert done.stderr.startswith("error: --push someone/tiny: the hub says: ") and "507" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_token_that_may_not_write_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    (tmp_path / "student").mkdir()
    done = pushed(hub, tmp_path / "student", "private")
    assert done.returncode == 1 and hub.files == {}
    assert done.stderr.startswith("error: --push someone/tiny: the hub says: 403")
    assert "set HF_TOKEN to a token that may write" in done.stderr and "hf_secret" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--push=tiny"], "must name a user, or an organisation, and a model: user/model"),
        (["--push=a/b/c"], "is no name on the hub"),
        (["--push=a/b c", "--dry-run"], "is no name on the hub"),
        (["--push=a/b"], "HF_HUB_OFFLINE is set, so nothing goes to the hub"),
        (["--to-pytorch", "--out=x", "--dry-run"], "--public and --dry-run are of --push USER/NAME"),
        (["--to-pytorch"], "give --out DIR, a folder to write, or --push USER/NAME"),
        (["--out=x"], "give the format of the weights: --to-pytorch or --to-flax"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_read(arguments: list[str], said: str, tmp_path: Path) -> None:
    code, out, err = tiny_run.call(cli.main, ["export", f"--workdir={tmp_path}", *arguments])
    assert (code, out) == (2, "") and said in err.splitlines()[-1]


@pytest.mark.slow
def test_a_dry_run_shows_what_would_go_and_keeps_nothing(tiny: tiny_run.Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run.train(tiny, run, train__steps=1)
    before = sorted(tmp_path.iterdir())
    code, out, _ = tiny_run.call(cli.main, ["export", f"--workdir={run}", "--push=someone/tiny", "--dry-run", "--json"])
    values = json.loads(out)
    assert code == 0 and values["address"] == "" and values["step"] == 1
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= values["files"].keys()
    assert all(size > 0 for size in values["files"].values()) and sorted(tmp_path.iterdir()) == before


def test_a_card_has_its_figures_where_the_hub_reads_them() -> None:
    origin = Origin(how="distilled", teacher=Source(name="user/teacher", base_models=("user/teacher",)))
    figures = {"perplexity": 4.25, "mlm_accuracy": 0.5, "kl": 1e-7, "teacher_perplexity": 3.75}
    recipe = {"data": {"source": "hf", "path": "user/words", "prepared": ""}}
    results = Results(figures, 20, 'all rows of `he said: "held"`')
    card = ModelCard(model_card(Card(name="user/tiny", origin=origin, recipe=recipe, results=results)))
    found = {one.metric_name: (one.metric_type, one.metric_value) for one in card.data.eval_results or ()}
    assert found == {"perplexity": ("perplexity", 4.25), "mlm_accuracy": ("accuracy", 0.5), "kl": ("kl", 1e-7)}
    assert {one.dataset_name for one in card.data.eval_results or ()} == {'all rows of he said: "held"'}
    assert card.data.model_name == "user/tiny" and card.data.datasets == ["user/words"]
    assert card.data.tags == ["jaxdistill", "distillation", "knowledge-distillation"]
    assert card.data.base_model == "user/teacher" and card.data.pipeline_tag == "fill-mask"


@pytest.mark.parametrize("results", [None, Results({}, None, "x"), Results({"teacher_perplexity": 2.0}, 1, "x")])
def test_a_card_without_figures_has_no_index_of_them(results: Results | None) -> None:
    card = model_card(Card(name="tiny", origin=Origin(how="trained"), recipe={}, results=results))
    assert "model-index" not in card
