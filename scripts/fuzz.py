"""Fuzzes one reader of files with atheris, guided by the branches that its input takes.

pip install atheris && python scripts/fuzz.py READER [libFuzzer's flags, such as -max_total_time=600]

READER is a key of READERS in tests/readers.py, such as csv, msgpack or "config of bert". The first inputs are the good
file; what is found is an input with which the reader neither returns nor raises a UserError.
"""

import importlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "models"), str(REPOSITORY)]
os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}

atheris: Any = importlib.import_module("atheris")  # not a dependency

with atheris.instrument_imports(include=["jaxdistill"]):
    from readers import READERS

    from jaxdistill.errors import UserError


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: fuzz.py READER [flags]; READER is one of {', '.join(READERS)}")
    reader = READERS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary) / "folder", Path(temporary) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        reader.write(folder)
        (corpus / "good").write_bytes((folder / reader.name).read_bytes())

        def once(data: bytes) -> None:
            (folder / reader.name).write_bytes(data)
            with suppress(UserError):
                reader.read(folder)

        atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
