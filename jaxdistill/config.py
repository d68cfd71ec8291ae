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
    config.teacher.name = ""  # folder or hub name of a masked or causal LM; "" = no teacher, plain training
    config.teacher.revision = ""  # of the hub name
    config.teacher.dtype = "float32"  # compute and storage: float32 | bfloat16 (losses stay float32)
    # Kernel of its self-attention: xla | cudnn (bfloat16 on a GPU) | own (its class's; ALBERT: always).
    config.teacher.attention = "xla"
    config.teacher.devices = 0  # that it has to itself, those after the student's; 0 = all, with the student

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
    config.student.attention = "xla"  # as the teacher's; with attention dropout, training is by its class's own
    # Computed again in the backward pass, to save memory: "" = nothing | dots: all but products with parameters | full.
    config.student.remat = ""
    config.student.devices = 0  # that it has to itself, the first; 0 = all, with the teacher
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
    config.data.prompt_column = ""  # causal models: the column of what comes before it; "" = plain text
    # How the two make a text. What stands before {completion} is the prompt, white space right before it excepted.
    config.data.template = "{prompt}\nTL;DR: {completion}"
    config.data.prompt_loss = False  # also learn to predict the prompt
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

    config.mask = ConfigDict()  # of masked LMs; causal ones predict every next token
    config.mask.fraction = 0.15  # of the real tokens
    config.mask.replace = (0.8, 0.1, 0.1)  # of those: by [MASK], left as they are, by a random token
    config.mask.smoothing = 0.7  # rare tokens first: weight = count ** -smoothing; 0 = plain draw
    config.mask.group = 8  # rows drawn together (the reference: one device's batch); causal recipes set 1

    config.loss = ConfigDict()
    config.loss.temperature = 2.0  # of alpha_ce
    # alpha_ce and alpha_mse on: all | labels (masked, or to be predicted) | masked (gathered before the head).
    config.loss.tokens = "all"
    config.loss.alpha_ce = 5.0  # the divergence of teacher and student at the temperature, times temperature squared
    # forward_kl | reverse_kl | jsd | skewed_kl | skewed_reverse_kl | total_variation
    config.loss.divergence = "forward_kl"
    config.loss.beta = 0.5  # of jsd: 0 = forward_kl to 1 = reverse_kl; of the skewed ones their skew (DistiLLM: 0.1)
    config.loss.head = "fused"  # fused: head and losses in chunks of tokens | dense: all logits, for comparison
    config.loss.alpha_mlm = 2.0  # masked LMs: cross entropy at the masked positions
    config.loss.alpha_clm = 2.0  # causal LMs: cross entropy of the next token
    config.loss.alpha_cos = 1.0  # 1 - cosine of the last hidden states
    config.loss.alpha_mse = 0.0  # squared difference of logits, summed over the vocabulary
    config.loss.alpha_hidden_mse = 0.0  # squared difference of hidden states, mean over the width, by layer_map
    config.loss.alpha_hidden_cos = 0.0  # 1 - cosine of hidden states, by layer_map
    config.loss.alpha_attention = 0.0  # KL of attention maps (MobileBERT's attention transfer), by layer_map
    config.loss.alpha_policy = 0.0  # MiniLLM's policy gradient of the reverse KL, on what is sampled; see `policy`
    config.loss.alpha_repetition = 0.0  # on what is sampled: expected repetition of its words
    config.loss.alpha_diversity = 0.0  # ... expected embeddings closer together than policy.diversity_target
    config.loss.alpha_entropy = 0.0  # ... less entropy than policy.entropy_target
    # ((student layer, teacher layer), ...), counted from 0, -1 = the embeddings; None = the layers cut, or spread.
    config.loss.layer_map = config_dict.placeholder(object)
    # Temperature and weights at the last step, {"temperature": 1.0, "alpha_clm": 0.0}; None = as at the first.
    config.loss.end = config_dict.placeholder(object)
    config.loss.ramp = "linear"  # the way there: linear | cosine

    config.sample = ConfigDict()  # text that causal models write themselves to learn from
    config.sample.student = 0.0  # share of the updates on the student's own completions (GKD's lambda)
    config.sample.teacher = 0.0  # share of the updates on the teacher's (1.0: sequence-level distillation)
    config.sample.max_new_tokens = 64  # of a completion; its prompt has the rest of data.max_length
    config.sample.prompt_tokens = 0  # a row's first so many are the prompt; 0 = what is not predicted (prompt_column)
    config.sample.temperature = 1.0  # 0 = the likeliest token
    config.sample.top_k = 0  # 0 = all
    config.sample.top_p = 1.0  # 1 = all

    config.policy = ConfigDict()  # of alpha_policy: rows of its own beside those of the text, one completion a prompt
    config.policy.semantics = "paper"  # paper: MiniLLM's equations | lmops: what its authors' code computes
    config.policy.mixture = 0.2  # the teacher's share of the distribution that is sampled from
    config.policy.single_step = True  # the next token's part exactly, by a sum over the vocabulary
    config.policy.length_norm = True  # paper: what follows a token as a mean and not as a sum
    config.policy.clip = 0.2  # of the ratio to the sampling distribution; 0 = off
    config.policy.reuse = 1  # updates that a sample serves
    config.policy.gamma = 0.95  # lmops: discount
    config.policy.reward_scale = 0.5  # lmops: divides the rewards
    config.policy.reward_clip = 100.0  # lmops: bounds them then
    config.policy.diversity_target = 0.5  # mean cosine distance of a completion's expected embeddings
    config.policy.entropy_target = 2.0  # nats

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
    config.optim.no_decay = ("bias$", "(?i)(norm|ln_[a-z0-9]+)/(scale|weight)$")  # regular expressions on paths
    config.optim.clip = 5.0  # global norm of the gradient; 0 = off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1 = all that are left
    config.mesh.fsdp = 1  # devices that split the batch and the parameters of both models

    config.evaluate = ConfigDict()
    config.evaluate.every = 0  # steps; 0 = after every epoch
    config.evaluate.batches = 32  # of held-out text; 0 = all
    config.evaluate.batch_size = 32  # rows
    config.evaluate.metrics = ("perplexity", "agreement")  # and pseudo_perplexity (masked LMs), rouge (causal)
    config.evaluate.pseudo_rows = 32  # rows that pseudo_perplexity reads (one forward a token)
    # Sub-networks measured as well, each as student.layers names layers: ("every_other", "first:2", "0,3").
    config.evaluate.pruned = ()
    # Shown to both models at the end: texts with [MASK] in them, to be filled; of causal models, to be continued.
    config.evaluate.prompts = ()
    config.evaluate.max_new_tokens = 100  # of a continuation, at most; chosen greedily
    config.evaluate.rouge_rows = 64  # held-out prompts whose completions rouge scores; 0 = all

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
    """(dotted key, value) of every value; those of DICTS are one value, though they may be dicts."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and f"{prefix}{key}" not in DICTS:
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
    # A key that the run did not know yet was, in effect, at its default.
    before = dict(_flatten(ConfigDict(json.loads(to_json(base()))))) | dict(_flatten(ConfigDict(old)))
    after = dict(_flatten(ConfigDict(json.loads(to_json(new)))))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not key.startswith(RESUMABLE) and before.get(key) != after.get(key)
    ]


DTYPES = ("float32", "bfloat16")
DICTS = ("student.overrides", "loss.end")
ON_SAMPLES = ("policy", "repetition", "diversity", "entropy")
ALPHAS = ("ce", "mlm", "clm", "cos", "mse", "hidden_mse", "hidden_cos", "attention", *ON_SAMPLES)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation")
NEED_TEACHER = tuple(name for name in ALPHAS if name not in ("mlm", "clm", "repetition", "diversity", "entropy"))
METRICS = ("perplexity", "agreement", "pseudo_perplexity", "rouge")


def alphas(config: Config) -> dict[str, float]:
    """The weights, at the first step, of the losses that are on; without a teacher only `mlm` and `clm` are.

    Which of these two counts is known with the model: build_objective leaves the other out.
    """
    weights = {name: float(config.loss[f"alpha_{name}"]) for name in ALPHAS}
    on = [name for name, weight in weights.items() if weight or ends(config).get(name)]
    return {name: weights[name] for name in on if config.teacher.name or name not in NEED_TEACHER}


def ends(config: Config) -> dict[str, float]:
    """`loss.end` by the names of an objective: "temperature", and terms."""
    return {key.removeprefix("alpha_"): float(value) for key, value in dict(config.loss.end or {}).items()}


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


def _ends(values: Any) -> str | None:
    names = ("temperature", *(f"alpha_{name}" for name in ALPHAS))
    for key, value in dict(values or {}).items():
        if key not in names:
            return f"holds {key!r}; there are {', '.join(names)}"
        if not _numbers((value,)) or not math.isfinite(value) or value < 0 or (key == "temperature" and value == 0):
            return f"{key} must be a number of 0 or more, a temperature above 0"
    return None


def _template(value: str) -> str | None:
    fits = value.count("{prompt}") == value.count("{completion}") == 1 and value.endswith("{completion}")
    return None if fits else "must hold {prompt} once and end with {completion}"


def _widths(values: tuple) -> str | None:
    fits = all(isinstance(v, int) and v > 2 for v in values) and list(values) == sorted(set(values))
    return None if fits else "must be ascending numbers of tokens"


# Rules on one value; rules on several stand in `validate`.
RULES: dict[str, Callable[[Any], str | None]] = {
    "seed": _between(0, 2**31 - 1),
    "teacher.dtype": _choice(*DTYPES),
    "student.dtype": _choice(*DTYPES),
    "teacher.attention": _choice("xla", "cudnn", "own"),
    "student.attention": _choice("xla", "cudnn", "own"),
    "student.remat": _choice("", "dots", "full"),
    "teacher.devices": _at_least(0),
    "student.devices": _at_least(0),
    "student.init": _choice("teacher", "random"),
    "student.family": _choice("", "distilbert"),
    "student.layer_drop": lambda v: None if 0 <= v < 1 else "must be at least 0 and below 1",
    "student.layer_drop_depth": _choice("constant", "linear"),
    "student.layer_drop_schedule": _choice("constant", "linear"),
    "data.source": _choice("text", "csv", "tsv", "jsonl", "parquet", "hf", "tfds"),
    "data.template": _template,
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
    "loss.tokens": _choice("all", "labels", "masked"),
    "loss.end": _ends,
    "loss.ramp": _choice("linear", "cosine"),
    "loss.divergence": _choice(*DIVERGENCES),
    "loss.beta": _between(0, 1),
    "loss.head": _choice("fused", "dense"),
    **{f"loss.alpha_{name}": _at_least(0) for name in ALPHAS},
    "loss.layer_map": _pairs,
    "sample.student": _between(0, 1),
    "sample.teacher": _between(0, 1),
    "sample.max_new_tokens": _at_least(1),
    "sample.prompt_tokens": _at_least(0),
    "sample.temperature": _at_least(0),
    "sample.top_k": _at_least(0),
    "sample.top_p": lambda v: None if 0 < v <= 1 else "must be above 0 and at most 1",
    "policy.semantics": _choice("paper", "lmops"),
    "policy.mixture": lambda v: None if 0 <= v < 1 else "must be at least 0 and below 1",
    "policy.clip": lambda v: None if 0 <= v < 1 else "must be at least 0 (off) and below 1",
    "policy.reuse": _at_least(1),
    "policy.gamma": _between(0, 1),
    "policy.reward_scale": _above(0),
    "policy.reward_clip": _above(0),
    "policy.diversity_target": _between(0, 2),
    "policy.entropy_target": _at_least(0),
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
    "evaluate.max_new_tokens": _at_least(1),
    "evaluate.rouge_rows": _at_least(0),
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
            + ("" if c.teacher.name else " (without a teacher only alpha_mlm and alpha_clm count)")
        )
    for side in ("teacher", "student"):
        if c[side].attention == "cudnn" and c[side].dtype != "bfloat16":
            raise UserError(
                f"config.{side}.attention=cudnn takes 16 bits, and config.{side}.dtype={c[side].dtype}; "
                "set that to bfloat16, or attention to xla"
            )
    if c.student.attention == "cudnn" and c.data.max_length % 2:
        raise UserError(
            f"config.student.attention=cudnn trains on rows of even length, and config.data.max_length="
            f"{c.data.max_length}; make it even, or attention xla"
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
    _validate_sampling(c)
    _validate_devices(c)
    for name in c.evaluate.metrics:
        if name not in METRICS:
            raise UserError(f"config.evaluate.metrics holds {name!r}; there are {', '.join(METRICS)}")
    if c.evaluate.pruned and "perplexity" not in c.evaluate.metrics:
        raise UserError("config.evaluate.pruned is set: add perplexity to config.evaluate.metrics, which measures it")
    for name in c.export.to:
        if name not in ("pytorch", "flax"):
            raise UserError(f"config.export.to holds {name!r}; there are pytorch and flax")


def _validate_devices(c: Config) -> None:
    student, teacher = c.student.devices, c.teacher.devices
    if not student and not teacher:
        return
    both = f"config.student.devices={student} and config.teacher.devices={teacher}"
    if not (student and teacher):
        raise UserError(f"{both} go together; set both, or neither")
    if not c.teacher.name:
        raise UserError(f"{both}, and there is no teacher to have devices; set both to 0, or config.teacher.name")
    if samples(c):
        raise UserError(f"{both}: models that write text run on the same devices; set both to 0")
    if c.mesh.data != -1:
        raise UserError(f"config.mesh.data={c.mesh.data} is of one mesh for both models; with {both}, set it to -1")
    if student % c.mesh.fsdp or teacher % c.mesh.fsdp:
        raise UserError(f"config.mesh.fsdp={c.mesh.fsdp} must divide {both}")


def samples(config: Config) -> bool:
    """Whether models write text to learn from."""
    return bool(config.sample.student or config.sample.teacher or on_samples(config))


def on_samples(config: Config) -> list[str]:
    """The losses that are means over what is sampled."""
    return [name for name in alphas(config) if name in ON_SAMPLES]


def _validate_sampling(c: Config) -> None:
    if not samples(c):
        return
    if c.sample.student + c.sample.teacher > 1:
        raise UserError(
            f"config.sample.student={c.sample.student:g} and config.sample.teacher={c.sample.teacher:g} are shares of "
            "the updates, and add up to more than 1"
        )
    if c.sample.teacher and not c.teacher.name:
        raise UserError(f"config.sample.teacher={c.sample.teacher:g}, and no config.teacher.name says who writes")
    if c.sample.student and not {"ce", "mse"} & alphas(c).keys():
        raise UserError(
            "config.sample.student is set: on what the student wrote only config.loss.alpha_ce and alpha_mse teach it; "
            "set one of them"
        )
    if c.loss.tokens != "labels":
        raise UserError(
            f"config.loss.tokens={c.loss.tokens!r}: it must be labels where models write what is learnt from"
        )
    if c.data.batching == "packed":
        raise UserError("config.data.batching=packed has no prompts to write on from; set it to length")
    if not (c.data.prompt_column or c.data.prepared or c.sample.prompt_tokens):
        raise UserError("config.sample.prompt_tokens is 0 and there is no data.prompt_column; set one of them")
    if c.sample.max_new_tokens >= c.data.max_length:
        raise UserError(
            f"config.sample.max_new_tokens={c.sample.max_new_tokens} leaves no room for a prompt in "
            f"config.data.max_length={c.data.max_length}; lower it"
        )
    on = on_samples(c)
    if on and (c.sample.student or c.sample.teacher):
        raise UserError(
            f"config.loss.alpha_{on[0]} samples rows of its own; set config.sample.student and teacher to 0"
        )
    if on and (c.sample.temperature, c.sample.top_k, c.sample.top_p) != (1, 0, 1):
        raise UserError(
            f"config.loss.alpha_{on[0]} is of what is drawn from the whole distribution: leave "
            "config.sample.temperature, top_k and top_p at 1, 0 and 1"
        )
    if on and c.student.layer_drop:
        raise UserError(
            f"config.student.layer_drop={c.student.layer_drop:g} and config.loss.alpha_{on[0]}: the whole student "
            "writes, and a part of it would learn from that; set one of them to 0"
        )
    if on and not c.teacher.name and c.policy.mixture:
        raise UserError("config.policy.mixture is set, and there is no teacher to mix with; set it to 0")
    for key, every in (("checkpoint.every", c.checkpoint.every), ("train.steps", c.train.steps)):
        if on and c.policy.reuse > 1 and (every == 0 or every % c.policy.reuse):
            raise UserError(
                f"config.{key}={every} must be a multiple of config.policy.reuse={c.policy.reuse}, "
                "as a sample is not saved"
            )
