"""The settings of a whole run: the sections of all rooms together, and the rules between sections.

A recipe (`configs/*.py`) calls `base()`, changes what it needs and returns it; `recipe.py` reads it into a `Config`.
Package code supplies no other default, so `<workdir>/config.json` shows every value that a run used.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from ml_collections import ConfigDict, FieldReference

from jaxdistill.data.settings import CacheConfig, DataConfig, MaskConfig
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.export.settings import ExportConfig
from jaxdistill.files import named_path
from jaxdistill.knobs import OneOf, Resumable, Rule, Section, knob, resumable_of
from jaxdistill.losses.divergences import BY_WRITER, DIVERGENCES
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.losses.settings import LossConfig
from jaxdistill.losses.terms import TERMS
from jaxdistill.models.settings import StudentConfig, TeacherConfig, TokenizerConfig
from jaxdistill.sampling.settings import SampleConfig
from jaxdistill.step.optimizer import OptimConfig
from jaxdistill.step.settings import MeshConfig, TrainConfig

__all__ = ["DIVERGENCES", "Config", "base", "check_variant"]  # for recipes


_FIGURES = [figure for row in EVALUATORS.values() for figure in row.lower]


class CheckpointConfig(Section):
    """When the run is saved, and which checkpoints are kept."""

    every: int = knob(0, "Steps between checkpoints; 0 = after every epoch.", ge=0, resumable=True)
    minutes: float = knob(
        15.0,
        "Longest time between checkpoints, in minutes, besides those of `every`; 0 = no limit.",
        ge=0,
        resumable=True,
    )
    keep: int = knob(2, "Number of most recent checkpoints to keep, besides the best one.", ge=1, resumable=True)
    keep_epochs: bool = knob(False, "Also keep the checkpoint after every epoch.", resumable=True)
    best: Annotated[str, OneOf(("", *_FIGURES))] = knob(
        "perplexity",
        "Figure of the evaluation, lower being better, that decides on the best checkpoint; empty keeps no best one.",
        resumable=True,
    )


def steps_to_profile(text: str) -> range:
    """The steps of FIRST:END, without END; an empty range where the text is something else."""
    first, _, end = text.partition(":")
    numbers = all(part.isascii() and part.isdigit() and len(part) < 10 for part in (first, end))
    return range(int(first), int(end)) if numbers and int(first) else range(0)


class LogConfig(Section):
    """Where figures are written, besides <workdir>/metrics.jsonl."""

    every: int = knob(10, "Steps between records of training.", ge=1, resumable=True)
    tensorboard: bool = knob(False, "Also write TensorBoard files (extra `tensorboard`).", resumable=True)
    wandb: str = knob("", "Also log to this project of Weights & Biases (extra `wandb`).", resumable=True)
    trackio: str = knob("", "Also log to this project of trackio (extra `trackio`).", resumable=True)

    @property
    def shows_texts(self) -> bool:
        """Whether figures go to a place that shows texts and tables as well."""
        return bool(self.tensorboard or self.wandb or self.trackio)

    profile: Annotated[
        str,
        Rule(
            "must be FIRST:END with 1 <= FIRST < END, such as 10:13, or empty",
            lambda text: not text or len(steps_to_profile(text)) > 0,
        ),
    ] = knob(
        "",
        "Steps that are traced for xprof into <workdir>/profile, as FIRST:END without END: 10:13 traces 10, 11 and 12.",
        resumable=True,
    )


class Config(Section):
    """All settings of a run."""

    seed: int = knob(0, "Seed of initialisation, data order, masks, dropout and sampling.", ge=0, le=2**31 - 1)
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    cache: CacheConfig = CacheConfig()
    loss: LossConfig = LossConfig()
    sample: SampleConfig = SampleConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    @property
    def losses(self) -> dict[str, float]:
        """The weights of the losses that are on; without a teacher those that need none."""
        return self.loss.enabled(teacher=bool(self.teacher.count))

    @property
    def losses_on_samples(self) -> list[str]:
        """The losses that are means over text that models write."""
        return [name for name in self.losses if TERMS[name].sees == "samples"]

    @property
    def samples(self) -> bool:
        """Whether models write text to learn from."""
        return bool(self.sample.student or self.sample.teacher or self.losses_on_samples)

    def changed(self, **sections: dict[str, Any]) -> "Config":
        """A copy with other values, by section: changed(train={"batch_size": 8})."""
        new = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=new)


if TYPE_CHECKING:
    Recipe = Config  # so that type checkers see the keys that a recipe sets
else:
    Recipe = ConfigDict

TEXT_OR_TEXTS = ("teacher.cache",)  # settings that are a text, or a tuple of texts


def base() -> Recipe:
    """The default config for recipes: an ml_collections.ConfigDict with the keys of Config, whose values may be set.

    It is locked, so a key that does not exist cannot be set.
    """
    config: Any = ConfigDict()
    for key, value in flat(Config().model_dump()):
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        any_type = value is None or key in TEXT_OR_TEXTS
        (config[section] if section else config)[name] = FieldReference(value, field_type=object) if any_type else value
    return config.lock()


class NoVariantError(UserError):
    """A recipe has no variant of this name; `names` are those that there are."""

    def __init__(self, variant: str, names: tuple[str, ...]):
        super().__init__(f"the recipe has no variant {variant!r}; there are {', '.join(names)}")
        self.names = names


def check_variant(variant: str, *names: str) -> None:
    """For recipes, whose variants have these names: a mistyped variant must not train the recipe without one.

    Raises:
      NoVariantError: names the variants that there are; "" stands for the recipe itself.
    """
    if variant and variant not in names:
        raise NoVariantError(variant, names)


def flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every knob, of the values of a Config or of a part of them."""
    for key, value in values.items():
        if key in Config.model_fields and isinstance(value, dict):
            for name, inner in value.items():
                yield f"{key}.{name}", inner
        else:
            yield key, value


def to_json(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=2)


def recorded_values(recorded: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of the config that a run recorded. A key that it did not have yet was at its default."""
    return values_of(Config()) | dict(flat(recorded))


def values_of(config: Config) -> dict[str, Any]:
    """Dotted key -> value as in JSON, to compare with `recorded_values`."""
    return dict(flat(json.loads(to_json(config))))


def differences(recorded: dict[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """Lists (key, old, new) of knobs that differ and may not, as the parameters of a resumed run would change.

    Knobs of which only the content, or the length of the run, may not differ are not among them: see run/resume.py.
    """
    before, after = recorded_values(recorded), values_of(new)
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not resumable_in(key) and before.get(key) != after.get(key)
    ]


def resumable_in(key: str) -> Resumable:
    """Whether the knob of a dotted key may change when a run is resumed; False for a key that there is not."""
    section, _, name = key.rpartition(".")
    kind = Config.model_fields[section].annotation if section in Config.model_fields else Config
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
    return name in fields and resumable_of(fields[name])


def check(config: Config, *, own_losses: bool = False) -> None:
    """Checks every rule between knobs that needs neither text, nor a model, nor a device.

    Args:
      own_losses: whether a Python program adds losses to those of the settings.

    Raises:
      UserError: the first broken rule, with its key, its value and what to do.
    """
    config.data.check()
    config.mask.check()
    config.cache.check()
    config.train.check()
    if not config.losses and not own_losses:
        raise UserError(
            "no loss is enabled: set one of "
            + ", ".join(f"config.loss.alpha_{name}" for name in TERMS)
            + ("" if config.teacher.name else " (without a teacher only alpha_mlm and alpha_clm count)")
        )
    config.teacher.check()
    config.student.check()
    config.loss.check()
    config.evaluate.check()
    for rule in (
        _attention_and_rows,
        _where_models_come_from,
        _cached_teacher,
        _several_teachers,
        _revisions,
        _rows_divide,
        _sampling,
        _policy_gradient,
        _relations,
        _sides,
        _devices,
    ):
        rule(config)


def _attention_and_rows(c: Config) -> None:
    if c.student.attention == "cudnn" and c.data.max_length % 2:
        raise UserError(
            f"config.student.attention=cudnn trains on rows of even length, and config.data.max_length="
            f"{c.data.max_length}; make it even, or attention xla"
        )


def _where_models_come_from(c: Config) -> None:
    described = c.student.init == "random" and (c.student.overrides or c.student.family)
    if not (c.teacher.name or c.student.name or described):
        raise UserError(
            "config.teacher.name is empty, so there is nothing to cut a student from; name a teacher, or a "
            'config.student.name, or config.student.init=random with config.student.overrides={"model_type": ...}'
        )
    if not (c.teacher.count or c.student.name or c.tokenizer.name):
        raise UserError("config.tokenizer.name is empty; name one, as there is no teacher to take it from")


def _cached_teacher(c: Config) -> None:
    """The rules of a run that reads a teacher's answers; those of its losses and its text need the cache itself."""
    if not c.teacher.caches:
        return
    key = f"config.teacher.cache={c.teacher.cache!r}"
    if not c.student.name and c.student.init != "random":
        raise UserError(
            f"{key}: no teacher is read that a student could be cut from; cut it with `jaxdistill init-student` and "
            "name its folder as config.student.name, or set config.student.init=random"
        )
    if c.samples:
        raise UserError(
            f"{key} has no answers on text that models write; set config.sample.student and teacher, and the losses on "
            "samples, to 0"
        )
    if c.teacher.devices:
        raise UserError(f"{key}: no teacher runs; set config.teacher.devices and config.student.devices to 0")


def _several_teachers(c: Config) -> None:
    """The rules of further teachers, which the losses on logits alone compare with."""
    if c.teacher.count < 2:
        return
    key = "config.teacher." + (f"also={c.teacher.also!r}" if c.teacher.also else f"cache={c.teacher.cache!r}")
    if not any(TERMS[name].needs_teacher and TERMS[name].sees == "logits" for name in c.losses):
        raise UserError(
            f"{key}: further teachers are for losses on logits, and none is on; set config.loss.alpha_ce, or name one "
            "teacher"
        )
    if c.losses_on_samples:
        raise UserError(
            f"{key}: config.loss.alpha_{c.losses_on_samples[0]} is of text that one teacher scores; set it to 0, or "
            "name one teacher"
        )
    if "mse" in c.losses and c.teacher.combine == "probabilities":
        raise UserError(
            "config.teacher.combine=probabilities mixes probabilities, and config.loss.alpha_mse compares logits; set "
            "that to 0, or combine to losses"
        )
    if c.teacher.devices:
        raise UserError(f"{key}: several teachers run on the student's devices; set both devices to 0")


def _revisions(c: Config) -> None:
    for role, side in (("teacher", c.teacher), ("student", c.student), ("tokenizer", c.tokenizer)):
        if side.revision and (not side.name or named_path(side.name).is_dir()):
            named = f"{side.name} is a folder" if side.name else f"config.{role}.name is empty"
            raise UserError(
                f"config.{role}.revision={side.revision!r} is of a hub name, and {named}; "
                f"set config.{role}.revision to '', or name a model of the hub"
            )


def _rows_divide(c: Config) -> None:
    accumulation = max(c.train.accumulation, 1)
    if c.train.batch_size % (accumulation * c.mask.group):
        raise UserError(
            f"config.train.batch_size={c.train.batch_size} must be a multiple of train.accumulation="
            f"{accumulation} x mask.group={c.mask.group}; change one of the three"
        )


def _devices(c: Config) -> None:
    student, teacher = c.student.devices, c.teacher.devices
    if not student and not teacher:
        return
    both = f"config.student.devices={student} and config.teacher.devices={teacher}"
    if not (student and teacher):
        raise UserError(f"{both} go together; set both, or neither")
    if not c.teacher.name:
        raise UserError(f"{both}, and there is no teacher to have devices; set both to 0, or config.teacher.name")
    if c.samples:
        raise UserError(f"{both}: models that write text run on the same devices; set both to 0")
    if c.mesh.data != -1:
        raise UserError(f"config.mesh.data={c.mesh.data} is of one mesh for both models; with {both}, set it to -1")
    split = c.mesh.fsdp * c.mesh.tensor
    if student % split or teacher % split:
        named = f"config.mesh.fsdp={c.mesh.fsdp}" + (
            f" x config.mesh.tensor={c.mesh.tensor}" if c.mesh.tensor > 1 else ""
        )
        raise UserError(f"{named} must divide {both}")


def _sampling(c: Config) -> None:
    if not c.samples:
        return
    c.sample.check()
    if c.sample.teacher and not c.teacher.name:
        raise UserError(f"config.sample.teacher={c.sample.teacher:g}, and no config.teacher.name says who writes")
    of_logits = [name for name, term in TERMS.items() if term.tokens == "head"]
    if c.sample.student and not any(name in c.losses for name in of_logits):
        raise UserError(
            "config.sample.student is set: on what the student wrote only config.loss."
            f"{' and '.join(f'alpha_{name}' for name in of_logits)} teach it; set one of them"
        )
    if c.loss.tokens not in ("labels", "uncertain"):
        raise UserError(
            f"config.loss.tokens={c.loss.tokens!r}: it must be labels, or uncertain, where models write what is learnt "
            "from"
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


def _relations(c: Config) -> None:
    if "relation" in c.losses and c.student.layer_drop:
        raise UserError(
            f"config.student.layer_drop={c.student.layer_drop:g} may skip the student's last layer, whose relations "
            "config.loss.alpha_relation compares; set one of them to 0"
        )


def _sides(c: Config) -> None:
    if c.loss.divergence in BY_WRITER and "ce" in c.losses and not c.sample.student:
        raise UserError(
            f"config.loss.divergence={c.loss.divergence} has a side for what the student writes, and "
            "config.sample.student is 0; set it to a share of the updates, or the divergence to skewed_kl"
        )


def _policy_gradient(c: Config) -> None:
    """The rules of losses on text that is sampled for them alone."""
    if not c.losses_on_samples:
        return
    key = f"config.loss.alpha_{c.losses_on_samples[0]}"
    if c.sample.student or c.sample.teacher:
        raise UserError(f"{key} samples rows of its own; set config.sample.student and teacher to 0")
    if (c.sample.temperature, c.sample.top_k, c.sample.top_p) != (1, 0, 1):
        raise UserError(
            f"{key} is of what is drawn from the whole distribution: leave "
            "config.sample.temperature, top_k and top_p at 1, 0 and 1"
        )
    if c.student.layer_drop:
        raise UserError(
            f"config.student.layer_drop={c.student.layer_drop:g} and {key}: the whole student "
            "writes, and a part of it would learn from that; set one of them to 0"
        )
    if not c.teacher.name and c.policy.mixture:
        raise UserError("config.policy.mixture is set, and there is no teacher to mix with; set it to 0")
    for name, every in (("checkpoint.every", c.checkpoint.every), ("train.steps", c.train.steps)):
        if c.policy.reuse > 1 and (every == 0 or every % c.policy.reuse):
            raise UserError(
                f"config.{name}={every} must be a multiple of config.policy.reuse={c.policy.reuse}, "
                "as a sample is not saved"
            )
