"""Writers of figures: JSON lines always, TensorBoard, W&B and trackio by config, a progress bar on a terminal.

The keys of a record are stable: `step`, `time` (unix seconds), `kind` (train | eval), then the figures.
"""

import contextlib
import importlib.util
import json
import math
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.config import LogConfig
from jaxdistill.console import is_live
from jaxdistill.errors import UserError
from jaxdistill.files import appending, write_text, writing

WANDB_ID = "wandb-id.txt"
TRACKIO_ID = "trackio-id.txt"

Write = Callable[[int, str, Mapping[str, float]], None]  # (step, kind, figures)


class Table(NamedTuple):
    """Texts in columns, such as what teacher and student say to a prompt."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


ShowTable = Callable[[int, str, Table], None]  # (step, name, table)


class Tracker(NamedTuple):
    """A place for figures that shows tables of texts as well."""

    write: Write
    close: Callable[[], None]
    show: ShowTable


def jsonl(path: Path, *, resume_at: int) -> tuple[Write, Callable[[], None]]:
    """Appends a line for each record. Lines of steps after `resume_at` are removed, as those steps are run again."""
    with writing(path):
        if path.exists():
            # The last line of a killed run may be torn.
            kept = [line for line in path.read_text(errors="replace").splitlines() if 0 < resume_at >= _step_of(line)]
            write_text(path, "".join(f"{line}\n" for line in kept))
    append, close = appending(path)

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity; null is what pandas and jq read instead.
        values = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), "kind": kind, **values}
        append(f"{json.dumps(record, allow_nan=False)}\n".encode())

    return write, close


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def check_installed(settings: LogConfig) -> None:
    """Raises UserError where a writer that the config asks for is not installed."""
    for key, module, wanted in (
        ("tensorboard", "tensorboardX", settings.tensorboard),
        ("wandb", "wandb", bool(settings.wandb)),
        ("trackio", "trackio", bool(settings.trackio)),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"config.log.{key} needs the package {module}: pip install 'jaxdistill[{key}]'")


def tensorboard(folder: Path) -> Tracker:
    """Event files, written by this thread: tensorboardX's own writer has a thread that a full disk ends, after which
    its queue of ten figures fills, and training would wait for ever."""
    from tensorboardX.proto import event_pb2  # extra `tensorboard`; no TensorFlow
    from tensorboardX.summary import scalar, text

    make: Any = event_pb2  # its classes are made when it is imported, which no type checker sees
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    append, close = appending(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
    append(_framed(make.Event(wall_time=time.time(), file_version="brain.Event:2")))

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        event = make.Event(wall_time=time.time(), step=step)
        for name, value in figures.items():
            event.summary.MergeFrom(scalar(f"{kind}/{name}", value))
        append(_framed(event))

    def show(step: int, name: str, table: Table) -> None:
        append(_framed(make.Event(wall_time=time.time(), step=step, summary=text(name, as_markdown(table)))))

    return Tracker(write, close, show)


def as_markdown(table: Table) -> str:
    """A table as TensorBoard shows it: a cell is one line, and a bar in it no border."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    cells = [[" ".join(cell.split()).replace("|", "&#124;") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _framed(event: Any) -> bytes:
    """A record of a TFRecord file: the length, its checksum, the data, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def wandb(folder: Path, *, project: str, config: Mapping[str, Any]) -> Tracker:
    import wandb  # extra `wandb`

    run = wandb.init(project=project, dir=str(folder), id=_wandb_id(folder), resume="allow", config=dict(config))

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def show(step: int, name: str, table: Table) -> None:
        run.log({name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])}, step=step)

    return Tracker(write, run.finish, show)


def trackio(folder: Path, *, project: str, config: Mapping[str, Any]) -> Tracker:
    """A run of trackio, in the folder of this machine that TRACKIO_DIR names, or in the Space of TRACKIO_SPACE_ID."""
    import pandas as pd  # comes with datasets
    import trackio  # extra `trackio`

    id = _drawn_id(folder / TRACKIO_ID)
    name = f"{folder.absolute().name}-{id[:8]}"
    with contextlib.redirect_stdout(sys.stderr):  # it prints where its dashboard is, which is no result of a command
        run = trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False)

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def show(step: int, name: str, table: Table) -> None:
        run.log({name: trackio.Table(dataframe=pd.DataFrame(list(table.rows), columns=list(table.columns)))}, step=step)

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            run.finish()

    return Tracker(write, close, show)


def _drawn_id(path: Path, *, old: str = "") -> str:
    """The id that stands in a file of the run folder; a new one, or `old`, is written where there is none."""
    if not path.exists():
        with writing(path):
            write_text(path, old or uuid.uuid4().hex)
    return path.read_text().strip()


def _wandb_id(folder: Path) -> str:
    """The id of a run folder, drawn once, so that a resumed run continues its curves and no other run has the same.

    Runs of 0.1.0, which have W&B's files and no such id, go on with one that was made from the path of the folder.
    """
    of_path = folder.absolute().as_posix().replace("/", "-").strip("-")
    return _drawn_id(folder / WANDB_ID, old=of_path if (folder / "wandb").is_dir() else "")


def progress(*, total: int, start: int) -> tuple[Write, Callable[[], None], Callable[[str], None]]:
    """A live bar on a terminal, plain lines elsewhere; the third function prints a line without breaking the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    live = is_live()
    console = Console(stderr=True, highlight=False, force_terminal=live)
    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TextColumn("eta"),
        TimeRemainingColumn(elapsed_when_finished=True),
        # In a narrow terminal the end of the figures is cut off, and not the step.
        TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        expand=True,
        console=console,
        disable=not live,
    )
    task = bar.add_task("train", total=total, completed=start, figures="compiling")
    bar.start()

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        line = " ".join(f"{name} {_short(name, value)}" for name, value in figures.items())
        if kind == "train":
            bar.update(task, completed=step, figures=_of_bar(figures))
        if kind != "train" or not live:
            console.print(f"{kind} {step}/{total}: {line}", soft_wrap=True)

    return write, bar.stop, lambda line: console.print(line, soft_wrap=True)


def _of_bar(figures: Mapping[str, float]) -> str:
    """Loss, speed and input wait, then the single losses; metrics.jsonl has the other figures."""
    rates = {"tokens_per_s": "tok/s", "input_wait": "wait"}
    first = [f"loss {_short('loss', figures['loss'])}"]
    first += [f"{label} {_short(name, figures[name])}" for name, label in rates.items() if name in figures]
    shown = {"loss", "grad_norm", "learning_rate", *rates}
    terms = [f"{name} {_short(name, value)}" for name, value in figures.items() if name not in shown]
    return " ".join(first + terms)


def _short(name: str, value: float) -> str:
    if name.endswith("_per_s"):
        return f"{value:,.0f}"
    if name == "input_wait":
        return f"{value:.1%}"
    return f"{value:.4g}"


def both(*writes: Write) -> Write:
    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        for one in writes:
            one(step, kind, figures)

    return write
