"""The figures that a run has written: metrics.jsonl, read back."""

import json
from pathlib import Path
from typing import Any


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run in the order of writing: step, time, kind (train | eval) and figures; [] before the first.

    A line that is torn, as the last one of a killed run may be, is left out.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [record for line in lines if (record := _record_of(line))]


def _record_of(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}
