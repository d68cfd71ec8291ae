"""The entry point of training.

python -m jaxdistill.train --config configs/bert_mlm.py --workdir runs/bert [--config.key=value ...]
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from jaxdistill import cluster, processes
from jaxdistill.arguments import Parser, parse
from jaxdistill.console import LOADING, say_last, taking
from jaxdistill.errors import explained
from jaxdistill.run import mirror
from jaxdistill.run.stop import EXIT_CODE, Interrupted, listening

CONFIG_HELP = """\
Every setting of the recipe can be changed: --config.KEY=VALUE, as in --config.train.steps=1000 or
--config.data.path=corpus.txt. KEY is a section and a name: `jaxdistill settings` prints all keys with their
meaning, `jaxdistill settings WORD` those about a word; docs/settings.md has them as tables. config.json in a
run folder holds the values of the run. A value with spaces, quotes or brackets is quoted for the shell:
--config.student.layers="[0,2,4]".
"""
INTERRUPTED = "the same command goes on from the last checkpoint"
LESS_MEMORY = (
    "set a larger config.train.accumulation, config.student.remat=dots or full, or lower config.train.batch_size, "
    "config.evaluate.batch_size or config.data.max_length"
)


def make_parser() -> Parser:
    """The flags of training; `--config.KEY=VALUE` are not among them."""
    parser = Parser(
        prog="jaxdistill train",
        usage="%(prog)s [-h] --config RECIPE --workdir RUN [--allow-pickle] [--coordinator HOST:PORT --processes N "
        "--process-id I] [--config.KEY=VALUE ...]",
        description="Distils a student, or resumes a run.",
        epilog=CONFIG_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        help="recipe: a file, or a name that `jaxdistill recipes` lists, such as bert_mlm or, with a variant, "
        "bert_mlm:smoke",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=mirror.folder,
        help="folder of the run, or its address (gs://, s3://); a run that it holds is resumed",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")
    cluster.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags and the recipe, then trains; returns the exit code as `guarded` does."""
    flags, overrides = parse(make_parser(), sys.argv[1:] if argv is None else argv, takes_config=True)

    def run() -> None:
        with taking(LOADING):
            from jaxdistill import recipe
            from jaxdistill.run import loop

        config = recipe.read(flags.config, overrides)
        processes.join(cluster.cluster_of(flags))
        mirror.fetch(flags.workdir)
        loop.run(config, flags.workdir, allow_pickle=flags.allow_pickle, stop=stop)

    with listening() as stop:
        return guarded(run)


def guarded(run: Callable[[], None], *, less_memory: str = LESS_MEMORY, interrupted: str = INTERRUPTED) -> int:
    """Runs, and returns the exit code.

    0; 2 after an error that the user can fix, in one line; 1 after any other error, in one line as well;
    stop.EXIT_CODE after a signal, if the run saved its last step; 130 after Ctrl-C in any other command. With
    JAXDISTILL_TRACEBACK=1 in the environment the traceback of an error stands before its line.

    Args:
      less_memory: which values to change where memory runs out.
      interrupted: what Ctrl-C leaves behind, and what to do.
    """
    # Without this, gRPC and XLA write to the terminal before our first line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Where torch or TensorFlow is installed, transformers imports it: two seconds, for classes that are not used here.
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("USE_TF", "0")
    # Programs that took a second or more to compile are kept for the next run, where the user has a home folder. jax
    # reads this when it is imported.
    if (home := os.path.expanduser("~")) != "~":
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{home}/.cache/jaxdistill/compiled")
    try:
        run()
    except Interrupted as e:
        say_last(str(e))
        return EXIT_CODE
    except KeyboardInterrupt:
        say_last(line := f"interrupted; {interrupted}")
        return processes.leave(130, line)
    except BrokenPipeError:
        # The reader of our output has gone; the flush at Python's exit must not raise the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit:
        raise
    except BaseException as e:  # also what the libraries in Rust raise, which is no Exception
        code, line = processes.loss_in(e) or explained(e, less_memory=less_memory)
        if os.environ.get("JAXDISTILL_TRACEBACK"):
            traceback.print_exception(e)
        say_last(f"error: {line}")
        return processes.leave(code, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
