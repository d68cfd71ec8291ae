"""What the experiments in this folder share: runs that go on where they stopped, and tables of figures over seeds.

Every experiment is a folder with one subfolder for a seed, `seed0`, `seed1` and so on, which holds a run folder for
each arm, and in it the figures of the arm, `result.json`, once they are measured.
"""

import argparse
import glob
import gzip
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdistill.run.hooks import Hooks

ROOT = Path(__file__).resolve().parents[1]
Figures = Mapping[str, float]  # of one run: {name: value}


def add_flags(parser: argparse.ArgumentParser, *, section: str, arms: Iterable[str]) -> None:
    """The flags of every experiment. Seeds and arms may run side by side in several processes."""
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas; default: %(default)s")
    parser.add_argument("--arms", default=";".join(arms), help="to run and to report, separated by semicolons")
    parser.add_argument("--out", type=Path, help="file for the tables; default: results.md in --workdir")
    parser.add_argument("--section", default=section, help="the tables' place in --out; default: <!-- %(default)s -->")


def arms_of(flags: argparse.Namespace, known: Iterable[str]) -> list[str]:
    """The arms that --arms names, in the order of `known`.

    Raises:
      UserError: --arms names another one.
    """
    from jaxdistill.errors import UserError

    known, wanted = list(known), flags.arms.split(";")
    if strange := [arm for arm in wanted if arm not in known]:
        raise UserError(f"--arms names {strange[0]!r}, which is no arm; take some of {'; '.join(known)}")
    return [arm for arm in known if arm in wanted]


def seeds_of(flags: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in flags.seeds.split(",")]


def folder_of(workdir: Path, seed: int, arm: str) -> Path:
    """The run folder of an arm: its name, with one dash for what is no letter, digit or point."""
    return workdir / f"seed{seed}" / re.sub(r"[^\w.]+", "-", arm).strip("-")


def result_of(workdir: Path) -> Figures:
    return json.loads((workdir / "result.json").read_text())


def run(recipe: str, workdir: Path, settings: Mapping[str, Any], hooks: "Hooks | None" = None) -> Path:
    """A run of the ordinary trainer. One that is complete costs nothing."""
    from jaxdistill import files
    from jaxdistill import recipe as recipes
    from jaxdistill.run import loop
    from jaxdistill.run.hooks import Hooks

    done = workdir / "done.json"
    if not done.exists():
        began = time.monotonic()
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        loop.run(recipes.read(str(ROOT / "configs" / recipe), overrides), workdir, hooks=hooks or Hooks())
        files.write_text(done, json.dumps({"minutes": (time.monotonic() - began) / 60}))
    return workdir


def measured(workdir: Path, measure: Callable[[], Figures]) -> Figures:
    """The figures of a complete run, measured once and then read from its result.json."""
    from jaxdistill import files

    result = workdir / "result.json"
    if not result.exists():
        files.write_text(result, json.dumps(dict(measure()), indent=2))
    return result_of(workdir)


def records(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind, such as `train` or `eval`."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def complete_seeds(workdir: Path, arms: Iterable[str]) -> list[int]:
    """The seeds of which all `arms` are measured. A spread takes two, so fewer are said and count as none."""
    arms, seeds = list(arms), sorted(int(path.name.removeprefix("seed")) for path in workdir.glob("seed*"))
    seeds = [seed for seed in seeds if all((folder_of(workdir, seed, arm) / "result.json").exists() for arm in arms)]
    if len(seeds) < 2:
        print(f"{len(seeds)} complete seed(s); the report needs two, for a spread")
        return []
    return seeds


def write_text(patterns: str, option: str, path: Path) -> Path:
    """One file of the text that file names or globs, separated by commas, name.

    WikiText's tokenisation is undone where it is an escape (` @-@ `, <unk>), so that one tokenizer reads all texts.

    Raises:
      UserError: there is no such file.
    """
    from jaxdistill import files
    from jaxdistill.errors import UserError

    paths = [Path(name) for pattern in patterns.split(",") for name in sorted(glob.glob(pattern))]
    if not paths:
        raise UserError(f"{option} {patterns} names no file; give the text to use")
    text = ""
    for source in paths:
        with (gzip.open if source.suffix == ".gz" else open)(source, "rb") as file:
            text += file.read().decode("utf-8")
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "[UNK]")):
        text = text.replace(old, new)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # processes side by side share the text
        files.write_text(path, text)
    return path


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation; the value alone where there is one."""
    import numpy as np

    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(
    title: str,
    rows: Mapping[str, Sequence[Figures]],
    columns: Mapping[str, str],
    digits: Mapping[str, int] | None = None,
) -> list[str]:
    """Lines of a Markdown table: a row for every arm with its figures by seed, a column for every figure.

    Args:
      columns: {heading: name of the figure}; a figure that an arm lacks is an empty cell.
      digits: after the point, by name of the figure; 3 where it is not named.
    """
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, runs in rows.items():
        cells = [
            spread([run[key] for run in runs], (digits or {}).get(key, 3)) if key in runs[0] else ""
            for key in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def paired_table(
    title: str, rows: Mapping[str, Sequence[Figures]], baseline: Sequence[Figures], columns: Mapping[str, str]
) -> list[str]:
    """Difference to a baseline arm, seed by seed: mean, 95 % interval and p of Student's paired t-test."""
    from scipy import stats

    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, runs in rows.items():
        cells = []
        for key in columns.values():
            test = stats.ttest_rel([run[key] for run in runs], [run[key] for run in baseline])
            interval = test.confidence_interval()
            middle = (interval.low + interval.high) / 2
            cells.append(f"{middle:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], p {test.pvalue:.2g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_between(out: Path, marker: str, text: str) -> None:
    """Writes `text` between the comments <!-- marker --> and <!-- /marker --> of a document, in place of the old."""
    from jaxdistill import files

    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    written = out.read_text(encoding="utf-8") if out.exists() else f"{begin}\n{end}\n"
    before, _, rest = written.partition(begin)
    files.write_text(out, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def write_report(flags: argparse.Namespace, seeds: Sequence[int], paragraphs: Iterable[str]) -> Path:
    """Writes and prints what an experiment found, below a line of its seeds and versions; returns the file."""
    said = "\n\n".join((f"Seeds {', '.join(map(str, seeds))}; mean ± standard deviation; {versions()}.", *paragraphs))
    out = flags.out or flags.workdir / "results.md"
    write_between(out, flags.section, said)
    print(f"{said}\n\n{out} has these tables of {len(seeds)} seeds")
    return out


def versions() -> str:
    """The versions and the device that figures were made with, for the line above a table."""
    import jax

    import jaxdistill

    return f"jaxdistill {jaxdistill.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}"


def draw_band(axes: Any, curves: Sequence[Sequence[tuple[int, float]]], label: str, **style: Any) -> None:
    """Mean and range over seeds of curves that have the same steps: [(step, value), ...] of every seed."""
    import numpy as np

    steps = [step for step, _ in curves[0]]
    values = np.array([[value for _, value in curve] for curve in curves])
    (line,) = axes.plot(steps, values.mean(axis=0), label=label, **style)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def save_figure(figure: Any, path: Path) -> None:
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    part.replace(path)
