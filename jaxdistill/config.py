"""Every knob of a run, with its unit and default; the rules they must keep; and how a config file is read.

A recipe (`configs/*.py`) calls `base()`, changes what it needs and returns it. Package code supplies no
other default, so what `<workdir>/config.json` shows is what ran.
"""

import difflib
import json
import math
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from jaxdistill.errors import UserError

Config: TypeAlias = Any  # an ml_collections.ConfigDict, whose values have no static types

# What may change when a run is resumed: it does not enter the parameters.
RESUMABLE = ("evaluate.", "checkpoint.", "log.", "export.", "data.threads", "data.prefetch", "data.cache_dir")


def base() -> Config:
    """Returns the default config, locked: a key that is not here cannot be set."""
    config: Config = ConfigDict()
    config.seed = 0  # initialisation, data order, masks and dropout all derive from it

    config.teacher = ConfigDict()
    config.teacher.name = ""  # folder or hub name of a masked LM; "" = no teacher, plain masked-LM training
    config.teacher.revision = ""  # of the hub name
    config.teacher.dtype = "float32"  # compute and storage: float32 | bfloat16 (losses stay float32)

    config.student = ConfigDict()
    config.student.name = ""  # folder, hub name or run folder to start from; "" = by `init` below
    config.student.revision = ""  # of the hub name
    config.student.init = "teacher"  # teacher: its layers, copied | random
    # Which teacher layers: [0, 2, 4] | a count, spread evenly | every_other | first:N | last:N.
    config.student.layers = config_dict.placeholder(object)  # None = half of them, spread evenly
    config.student.family = ""  # "" = the teacher's; "distilbert" cuts a DistilBERT out of a BERT
    config.student.reference_init = False  # BERT to DistilBERT as the reference: no token type, random transform
    # Architecture fields, {"num_attention_heads": 6, ...}; sizes only with init=random; no teacher: also "model_type".
    config.student.overrides = config_dict.placeholder(object)
    config.student.dtype = "float32"  # compute; parameters and losses are float32
    config.student.layer_drop = 0.0  # LayerDrop: probability that a layer is left out of a training step
    config.student.layer_drop_depth = "constant"  # constant | linear: from 1 / layers of it to all of it in the last
    config.student.layer_drop_schedule = "constant"  # constant | linear: from 0 at the first step to it at the last

    config.tokenizer = ConfigDict()
    config.tokenizer.name = ""  # folder or hub name; "" = the teacher's, or else the student's
    config.tokenizer.revision = ""  # of the hub name

    config.data = ConfigDict()
    config.data.source = "text"  # text | csv | tsv | jsonl | parquet | hf | tfds
    config.data.path = ""  # file, glob or several with commas, .gz/.zst too; for hf and tfds the dataset's name
    config.data.column = "text"  # the text column, where there are columns
    config.data.subset = ""  # hf: configuration name
    config.data.revision = ""  # hf
    config.data.split = "train"  # hf, tfds
    config.data.streaming = False  # hf: do not download the whole first
    config.data.limit = 0  # documents at most; 0 = all
    config.data.eval_path = ""  # held-out text, same source and column; "" = the tail of the above
    config.data.eval_split = ""  # hf, tfds: held-out split; "" = the tail of `split`
    config.data.eval_fraction = 0.02  # share of rows held out, where no held-out text is named
    config.data.prepared = ""  # folder that `jaxdistill prepare` printed; then nothing above is read
    config.data.token_counts = ""  # .npy or .json with a count a token id; "" = counted from the text
    config.data.cache_dir = "~/.cache/jaxdistill"  # prepared text lands here, under a hash of its content
    config.data.max_length = 128  # tokens a row, the frame of special tokens included
    config.data.min_tokens = 12  # shorter rows are dropped (the reference drops 11 and fewer)
    config.data.max_unk_fraction = 0.5  # rows with this share of unknown tokens or more are dropped
    config.data.batching = "length"  # length: rows of like length together | packed: documents end to end
    config.data.buckets = ()  # widths of the batches, the last = max_length; () = a few by themselves
    config.data.threads = 2  # that read and mask ahead
    config.data.prefetch = 16  # batches read ahead

    config.mask = ConfigDict()
    config.mask.fraction = 0.15  # of the real tokens
    config.mask.replace = (0.8, 0.1, 0.1)  # of those: by [MASK], left as they are, by a random token
    config.mask.smoothing = 0.7  # rare tokens first: weight = count ** -smoothing; 0 = plain draw
    config.mask.group = 8  # rows drawn together (the reference: one device's batch)

    config.loss = ConfigDict()
    config.loss.temperature = 2.0  # of alpha_ce
    config.loss.tokens = "all"  # alpha_ce and alpha_mse on: all | masked (positions gathered before the head)
    config.loss.alpha_ce = 5.0  # the divergence of teacher and student at the temperature, times temperature squared
    # forward_kl | reverse_kl | jsd | skewed_kl | skewed_reverse_kl | total_variation
    config.loss.divergence = "forward_kl"
    config.loss.beta = 0.5  # of jsd: 0 = forward_kl to 1 = reverse_kl; of the skewed ones their skew (DistiLLM: 0.1)
    config.loss.head = "fused"  # fused: head and losses in chunks of tokens | dense: all logits, for comparison
    config.loss.alpha_mlm = 2.0  # cross entropy at the masked positions
    config.loss.alpha_cos = 1.0  # 1 - cosine of the last hidden states
    config.loss.alpha_mse = 0.0  # squared difference of logits, summed over the vocabulary
    config.loss.alpha_hidden_mse = 0.0  # squared difference of hidden states, mean over the width, by layer_map
    config.loss.alpha_hidden_cos = 0.0  # 1 - cosine of hidden states, by layer_map
    config.loss.alpha_attention = 0.0  # KL of attention maps (MobileBERT's attention transfer), by layer_map
    # ((student layer, teacher layer), ...), counted from 0, -1 = the embeddings; None = the layers cut, or spread.
    config.loss.layer_map = config_dict.placeholder(object)

    config.train = ConfigDict()
    config.train.steps = 0  # optimizer updates; 0 = by epochs
    config.train.epochs = 3.0  # passes over the text, where steps is 0
    config.train.limit_batches = 0  # updates an epoch at most; 0 = the whole text
    config.train.batch_size = 32  # rows an update, over all devices
    config.train.accumulation = 1  # micro-batches an update is cut into
    config.train.freeze = ()  # parameters whose path contains one of these regular expressions stay as they are

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw | lion | adafactor | sgd
    config.optim.learning_rate = 5e-4  # peak
    config.optim.schedule = "linear"  # after the warm-up: linear to 0 | cosine to 0 | constant
    config.optim.warmup = 0.05  # share of all steps
    config.optim.betas = (0.9, 0.98)  # of adamw and lion; the first is sgd's momentum
    config.optim.eps = 1e-6  # of adamw
    config.optim.weight_decay = 0.0  # times the learning rate, on all parameters but those of no_decay
    config.optim.no_decay = ("bias$", "(?i)(layer_?norm|ln_[a-z0-9]+)/scale$")  # regular expressions on paths
    config.optim.clip = 5.0  # global norm of the gradient; 0 = off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1 = all that are left
    config.mesh.fsdp = 1  # devices that split the batch and the parameters of both models

    config.evaluate = ConfigDict()
    config.evaluate.every = 0  # steps; 0 = after every epoch
    config.evaluate.batches = 32  # of held-out text; 0 = all
    config.evaluate.batch_size = 32  # rows
    config.evaluate.metrics = ("perplexity", "agreement")  # and pseudo_perplexity
    config.evaluate.pseudo_rows = 32  # rows that pseudo_perplexity reads (one forward a token)
    # Sub-networks measured as well, each as student.layers names layers: ("every_other", "first:2", "0,3").
    config.evaluate.pruned = ()
    config.evaluate.prompts = ()  # texts with [MASK] in them, filled by both models at the end

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps; 0 = after every epoch
    config.checkpoint.keep = 2  # the last so many, besides the best
    config.checkpoint.keep_epochs = False  # also the one after every epoch
    config.checkpoint.best = "perplexity"  # the evaluation figure, lower is better, by which the best is known

    config.log = ConfigDict()
    config.log.every = 10  # steps
    config.log.tensorboard = False  # extra: tensorboard
    config.log.wandb = ""  # project name; extra: wandb

    config.export = ConfigDict()
    config.export.to = ()  # at the end, to <workdir>/export-<format>: pytorch, flax
    config.export.license = ""  # for the model card, such as apache-2.0; "" = said to be unknown
    return config.lock()


def _flatten(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value; `student.overrides` is one value, though it may be a dict."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and f"{prefix}{key}" != "student.overrides":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse(path: str, overrides: Sequence[str]) -> Config:
    """Reads `configs/x.py` or `configs/x.py:variant` and applies `--config.key=value` overrides.

    Raises:
      UserError: no such file, an unknown key (with the nearest one), a value of the wrong type, or a broken rule.
    """
    file = path.split(":")[0]
    if not Path(file).is_file():
        raise UserError(f"--config: there is no file {file!r}")
    recipe = _recipe(path)
    if not isinstance(recipe, ConfigDict):
        raise UserError(f"{file}: get_config returned {type(recipe).__name__}; it must return a config")
    config = _override(recipe, overrides)
    known, given = dict(_flatten(base())), dict(_flatten(config))
    if missing := known.keys() - given.keys():
        raise UserError(f"{file}: no value for {min(missing)!r}; start from jaxdistill.config.base()")
    if unknown := given.keys() - known.keys():
        raise UserError(f"{file}: {_unknown(min(unknown), known)}")
    validate(config)
    return config


def apply(recorded: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config that stands in a run folder, with `--config.key=value` overrides.

    Raises:
      UserError: as `parse`.
    """
    config = base()
    known = dict(_flatten(config))
    for key, value in _flatten(ConfigDict(recorded)):
        if key not in known:
            raise UserError(f"config.json is of another version of jaxdistill: {_unknown(key, known)}")
        if value is not None:
            # JSON has lists where the config has tuples.
            fixed = tuple(value) if isinstance(value, list | tuple) else value
            config.update_from_flattened_dict({key: fixed})
    config = _override(config, overrides)
    validate(config)
    return config


def _recipe(path: str) -> Any:
    """What get_config of `file.py`, or of `file.py:variant`, returns."""
    file, *variant = path.split(":", 1)
    try:
        names = runpy.run_path(file)
        if "get_config" not in names:
            raise UserError(f"{file} has no function get_config")
        return names["get_config"](*variant)
    except UserError:
        raise
    except Exception as e:  # a recipe is the user's program: whatever it raises is told with its line
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        where = f"{file} line {lines[-1]}" if lines else file
        raise UserError(f"{where}: {type(e).__name__}: {_one_line(e)}") from e


def _override(config: Config, overrides: Sequence[str]) -> Config:
    known = dict(_flatten(base()))
    for item in overrides:
        if not item.startswith("--config.") or "=" not in item:
            raise UserError(f"unknown argument {item!r}; config values are given as --config.KEY=VALUE")
        key = item.removeprefix("--config.").split("=")[0]
        if key not in known:
            raise UserError(_unknown(key, known))
    argv = ["jaxdistill", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except flags.Error as e:
        raise UserError(_one_line(e)) from e


def _unknown(key: str, known: dict[str, Any]) -> str:
    tail = key.split(".")[-1]
    near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == tail]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown config key {key!r}{hint}"


def _one_line(error: Exception) -> str:
    # ConfigDict raises with the repr of its message, and lists all other keys in it.
    text = re.sub(r"^'(.*)'$", r"\1", str(error), flags=re.DOTALL).replace("\\n", " ").replace("\\'", "'")
    return " ".join(re.sub(r'Other fields present: "{.*}"', "", text).split())


def to_json(config: Config) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list)


def changed(old: dict[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """Lists (key, old, new) that differ and would change the parameters of a resumed run."""
    before = dict(_flatten(ConfigDict(old)))
    after = dict(_flatten(ConfigDict(json.loads(to_json(new)))))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not key.startswith(RESUMABLE) and before.get(key) != after.get(key)
    ]


DTYPES = ("float32", "bfloat16")
ALPHAS = ("ce", "mlm", "cos", "mse", "hidden_mse", "hidden_cos", "attention")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation")
NEED_TEACHER = tuple(name for name in ALPHAS if name != "mlm")


def alphas(config: Config) -> dict[str, float]:
    """The weights of the losses that are on; without a teacher only `mlm` is."""
    weights = {name: float(config.loss[f"alpha_{name}"]) for name in ALPHAS}
    return {k: v for k, v in weights.items() if v != 0 and (config.teacher.name or k not in NEED_TEACHER)}


def _choice(*options: str) -> Callable[[Any], str | None]:
    return lambda v: None if v in options else f"must be one of {', '.join(options)}"


def _at_least(low: float) -> Callable[[Any], str | None]:
    return lambda v: None if math.isfinite(v) and v >= low else f"must be at least {low:g}"


def _between(low: float, high: float) -> Callable[[Any], str | None]:
    return lambda v: None if low <= v <= high else f"must lie between {low:g} and {high:.10g}"


def _above(low: float) -> Callable[[Any], str | None]:
    return lambda v: None if math.isfinite(v) and v > low else f"must be above {low:g}"


def _patterns(values: tuple) -> str | None:
    for value in values:
        try:
            re.compile(value)
        except (re.error, TypeError) as e:
            return f"holds {value!r}, which is no regular expression ({e})"
    return None


def _numbers(values: tuple) -> bool:
    return all(isinstance(v, int | float) for v in values)


def _shares(values: tuple) -> str | None:
    shares = len(values) == 3 and _numbers(values) and all(v >= 0 for v in values)
    fits = shares and math.isclose(sum(values), 1, abs_tol=1e-6)
    return None if fits else "must be three shares (mask, keep, random) that add up to 1"


def _betas(values: tuple) -> str | None:
    fits = len(values) == 2 and _numbers(values) and all(0 <= v < 1 for v in values)
    return None if fits else "must be two numbers in [0, 1)"


def _texts(values: tuple) -> str | None:
    return None if all(isinstance(v, str) for v in values) else "must be texts"


def _pairs(values: Any) -> str | None:
    fits = values is None or (isinstance(values, list | tuple) and len(values) > 0)
    return None if fits else "must be None, or pairs ((student layer, teacher layer), ...)"


def _widths(values: tuple) -> str | None:
    fits = all(isinstance(v, int) and v > 2 for v in values) and list(values) == sorted(set(values))
    return None if fits else "must be ascending numbers of tokens"


# Rules on one value; rules on several stand in `validate`.
RULES: dict[str, Callable[[Any], str | None]] = {
    "seed": _between(0, 2**31 - 1),
    "teacher.dtype": _choice(*DTYPES),
    "student.dtype": _choice(*DTYPES),
    "student.init": _choice("teacher", "random"),
    "student.family": _choice("", "distilbert"),
    "student.layer_drop": lambda v: None if 0 <= v < 1 else "must be at least 0 and below 1",
    "student.layer_drop_depth": _choice("constant", "linear"),
    "student.layer_drop_schedule": _choice("constant", "linear"),
    "data.source": _choice("text", "csv", "tsv", "jsonl", "parquet", "hf", "tfds"),
    "data.limit": _at_least(0),
    "data.eval_fraction": _between(0, 0.5),
    "data.max_length": _at_least(4),
    "data.min_tokens": _at_least(3),
    "data.max_unk_fraction": _between(0, 1),
    "data.batching": _choice("length", "packed"),
    "data.buckets": _widths,
    "data.threads": _at_least(1),
    "data.prefetch": _at_least(1),
    "mask.fraction": _between(0.001, 1),
    "mask.replace": _shares,
    "mask.smoothing": _at_least(0),
    "mask.group": _at_least(1),
    "loss.temperature": _above(0),
    "loss.tokens": _choice("all", "masked"),
    "loss.divergence": _choice(*DIVERGENCES),
    "loss.beta": _between(0, 1),
    "loss.head": _choice("fused", "dense"),
    **{f"loss.alpha_{name}": _at_least(0) for name in ALPHAS},
    "loss.layer_map": _pairs,
    "train.steps": _at_least(0),
    "train.epochs": _at_least(0),
    "train.limit_batches": _at_least(0),
    "train.batch_size": _at_least(1),
    "train.accumulation": _at_least(1),
    "train.freeze": _patterns,
    "optim.name": _choice("adamw", "lion", "adafactor", "sgd"),
    "optim.learning_rate": _above(0),
    "optim.schedule": _choice("linear", "cosine", "constant"),
    "optim.warmup": _between(0, 1),
    "optim.betas": _betas,
    "optim.eps": _above(0),
    "optim.weight_decay": _at_least(0),
    "optim.no_decay": _patterns,
    "optim.clip": _at_least(0),
    "mesh.data": lambda v: None if v == -1 or v >= 1 else "must be -1 (all devices left) or at least 1",
    "mesh.fsdp": _at_least(1),
    "evaluate.every": _at_least(0),
    "evaluate.batches": _at_least(0),
    "evaluate.batch_size": _at_least(1),
    "evaluate.pseudo_rows": _at_least(1),
    "evaluate.pruned": _texts,
    "evaluate.prompts": _texts,
    "checkpoint.every": _at_least(0),
    "checkpoint.keep": _at_least(1),
    "checkpoint.best": _choice("", "perplexity", "mlm_loss", "kl", "pseudo_perplexity"),
    "log.every": _at_least(1),
}


def validate(config: Config) -> None:
    """Checks every rule that needs no file, model or device.

    Raises:
      UserError: the first broken rule, with its key, its value and what to do.
    """
    values = dict(_flatten(config))
    for key, default in _flatten(base()):
        if default is not None and values[key] is None:
            raise UserError(f"config.{key} is None; it must be of type {type(default).__name__}, such as {default!r}")
    for key, rule in RULES.items():
        if message := rule(values[key]):
            raise UserError(f"config.{key}={values[key]!r}: {message}")

    c = config
    if not (c.data.path or c.data.prepared):
        raise UserError(
            "config.data.path is empty; name a text file, or a folder of `jaxdistill prepare` in data.prepared"
        )
    if not (c.train.steps or c.train.epochs):
        raise UserError("config.train.steps and config.train.epochs are both 0; set one of them")
    if not alphas(c):
        raise UserError(
            "no loss is enabled: set one of "
            + ", ".join(f"config.loss.alpha_{n}" for n in ALPHAS)
            + ("" if c.teacher.name else " (without a teacher only alpha_mlm counts)")
        )
    if not c.teacher.name and not c.student.name and not (c.student.init == "random" and c.student.overrides):
        raise UserError(
            "config.teacher.name is empty, so there is nothing to cut a student from; name a teacher, or a "
            'config.student.name, or config.student.init=random with config.student.overrides={"model_type": ...}'
        )
    if not (c.teacher.name or c.student.name or c.tokenizer.name):
        raise UserError("config.tokenizer.name is empty; name one, as there is no teacher to take it from")
    if c.student.family and (c.student.init == "random" or c.student.name):
        raise UserError(f"config.student.family={c.student.family!r} goes with layers cut from the teacher alone")
    if not (c.data.eval_path or c.data.eval_split or c.data.eval_fraction):
        raise UserError("config.data.eval_fraction is 0 and no held-out text is named; set it, or data.eval_path")
    if c.loss.divergence.startswith("skewed") and c.loss.beta == 1:
        raise UserError(f"config.loss.beta=1.0 makes {c.loss.divergence} 0 everywhere; it must lie below 1")
    if c.data.buckets and c.data.buckets[-1] != c.data.max_length:
        raise UserError(
            f"config.data.buckets={c.data.buckets!r}: the last must be config.data.max_length={c.data.max_length}"
        )
    if c.train.batch_size % (c.train.accumulation * c.mask.group):
        raise UserError(
            f"config.train.batch_size={c.train.batch_size} must be a multiple of train.accumulation="
            f"{c.train.accumulation} x mask.group={c.mask.group}; change one of the three"
        )
    for name in c.evaluate.metrics:
        if name not in ("perplexity", "agreement", "pseudo_perplexity"):
            raise UserError(
                f"config.evaluate.metrics holds {name!r}; there are perplexity, agreement, pseudo_perplexity"
            )
    if c.evaluate.pruned and "perplexity" not in c.evaluate.metrics:
        raise UserError("config.evaluate.pruned is set: add perplexity to config.evaluate.metrics, which measures it")
    for name in c.export.to:
        if name not in ("pytorch", "flax"):
            raise UserError(f"config.export.to holds {name!r}; there are pytorch and flax")
