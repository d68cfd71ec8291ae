"""The knobs of teacher, student and tokenizer."""

from typing import Annotated, Any, Literal

from jaxdistill.errors import UserError
from jaxdistill.knobs import Rule, Section, knob

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["xla", "tiles", "splash", "cudnn", "own"]
Classes = Literal["auto", "flax", "core"]

_NAME = "Folder or hub name"
_ATTENTION = (
    "Kernel of self-attention: `xla` (in models of the core, tiles where rows are long); `cudnn` (NVIDIA GPUs, "
    "bfloat16); `own`, the code of the model's own class (always used for ALBERT); in models of the core also `tiles`, "
    "whose memory grows with the length of a row and not with its square, and `splash`, JAX's Pallas kernel for TPUs"
)
_CLASSES = (
    "What computes the model: transformers' Flax class (`flax`), the modules of this package (`core`), or `auto`, the "
    "Flax class where there is one that can follow the configuration, and else the core"
)
_SCAN = (
    "In models of the core, whether the layers are a loop in the program, which then compiles in the time of a few "
    "layers, however many there are. The loop takes a second copy of the parameters"
)


class TeacherConfig(Section):
    """The model that is imitated."""

    name: str = knob(
        "",
        f"{_NAME} of a masked or causal language model; empty trains the student without a teacher.",
        resumable="content",
    )
    revision: str = knob("", "Branch, tag or commit, where `name` is a hub name.", resumable="content")
    also: tuple[str, ...] = knob(
        (),
        "Further teachers, each a folder or hub name, for the losses on logits. Losses on hidden states, attention and "
        "relations, text that the teacher writes, and figures of agreement are of `name` alone. All have its settings.",
        resumable="content",
    )
    weights: Annotated[
        tuple[float, ...],
        Rule("must be numbers between 1e-6 and 1e6", lambda weights: all(1e-6 <= weight <= 1e6 for weight in weights)),
    ] = knob(
        (),
        "Weights of several teachers, those of `name` and `also`, or of the caches; each is divided by their sum. "
        "Empty: all equal.",
    )
    combine: Literal["losses", "probabilities"] = knob(
        "losses",
        "How several teachers teach: by the weighted mean of their losses (`losses`), or by one loss against the "
        "weighted mean of their probabilities at its temperature (`probabilities`).",
    )
    cache: str | tuple[str, ...] = knob(
        "",
        "Folder of `jaxdistill cache`, whose answers stand for the teacher: its weights are not read. A tuple of "
        "folders stands for several teachers.",
        resumable="content",
    )
    dtype: Dtype = knob("float32", "Data type of computation and of the stored parameters; losses stay float32.")
    attention: Attention = knob("xla", f"{_ATTENTION}.", resumable=True)
    classes: Classes = knob("auto", f"{_CLASSES}.", resumable=True)
    scan: bool = knob(False, f"{_SCAN}.", resumable=True)
    devices: int = knob(
        0,
        "Number of devices that run only the teacher, after those of the student; 0 shares all devices.",
        ge=0,
        resumable=True,
    )

    @property
    def caches(self) -> tuple[str, ...]:
        """The folders of answers that stand for teachers."""
        return tuple(filter(None, (self.cache,) if isinstance(self.cache, str) else self.cache))

    @property
    def count(self) -> int:
        """The number of teachers, whether they run or their answers are read."""
        return len(self.caches) or bool(self.name) + len(self.also)

    def check(self) -> None:
        _check_attention(self, "teacher")
        if self.also and self.caches:
            raise UserError(
                f"config.teacher.also={self.also!r} run, and config.teacher.cache={self.cache!r} stands for teachers "
                "that do not; name a cache of each teacher in config.teacher.cache, and set also to ()"
            )
        if self.also and not self.name:
            raise UserError(
                f"config.teacher.also={self.also!r} stand beside config.teacher.name, which is empty; name the first "
                "of them there, or set also to ()"
            )
        for key, names in (("also", self.also), ("cache", self.cache)):
            if isinstance(names, tuple) and "" in names:
                raise UserError(f"config.teacher.{key}={names!r} holds an empty name; leave it out")
        if self.weights and len(self.weights) != self.count:
            raise UserError(
                f"config.teacher.weights={self.weights!r} must be as many as there are teachers, {self.count}; name "
                "a weight for each, or none, which weighs all alike"
            )


SIZES = ("width", "inner", "heads")  # settings of a student that is cut by importance
# Settings that say how a student is made; those of a student that is read from a folder are not used.
HOW_MADE = ("init", "layers", "family", "reference_init", "overrides", *SIZES)


class StudentConfig(Section):
    """The model that is trained: what its parameters start from, and how it computes."""

    name: str = knob(
        "",
        f"{_NAME}, or run folder, to start from; empty starts from the teacher, or as `init` says.",
        resumable="content",
    )
    revision: str = knob("", "Branch, tag or commit, where `name` is a hub name.", resumable="content")
    init: Literal["teacher", "importance", "random"] = knob(
        "teacher",
        "Start from copies of teacher layers (`teacher`); from these with the channels, units and heads that matter "
        "most on the training text (`importance`, with `width`, `inner` or `heads`); or from random numbers.",
    )
    width: int = knob(0, "With init=importance, channels to keep; 0 = all, or as `heads` asks for.", ge=0)
    inner: int = knob(0, "With init=importance, units of each MLP to keep; 0 = all.", ge=0)
    heads: int = knob(0, "With init=importance, heads of each layer to keep; 0 = all, or as `width` asks for.", ge=0)
    score_rows: int = knob(
        512, "With init=importance, rows of the training text, the first ones, on which the teacher is scored.", ge=1
    )
    layers: int | str | tuple[Any, ...] | None = knob(
        None,
        "Teacher layers to copy: a list such as [0, 2, 4], a count (spread evenly), `every_other`, `first:N`, "
        "`last:N` or `spread:N`; None copies half of the layers, spread evenly, and with init=importance all.",
    )
    family: Literal["", "distilbert"] = knob(
        "",
        "Architecture of a student that is made from the teacher, copied or random: empty keeps the teacher's; "
        "`distilbert` goes with a BERT teacher. A student that is read from `name` keeps its own.",
    )
    reference_init: bool = knob(
        False,
        "DistilBERT from BERT as the reference scripts made it: token types are dropped and the transform of the "
        "head is random.",
    )
    overrides: dict[str, Any] | None = knob(
        None,
        "Fields of the architecture, such as {'num_attention_heads': 6}; sizes may change only with init=random; "
        "without a teacher 'model_type' must be among them, or `family` be set.",
    )
    dtype: Dtype = knob("float32", "Data type of computation; parameters and losses stay float32.")
    attention: Attention = knob(
        "xla",
        f"{_ATTENTION}. Training with dropout on attention maps always uses the class's own code.",
        resumable=True,
    )
    classes: Classes = knob("auto", f"{_CLASSES}.", resumable=True)
    scan: bool = knob(False, f"{_SCAN}, and always rematerialises: `full`, where `remat` is empty.", resumable=True)
    remat: Literal["", "dots", "full"] = knob(
        "",
        "Rematerialisation, which saves memory: empty keeps all activations for the backward pass; `dots` keeps only "
        "products with parameters; `full` keeps only the input of each layer.",
        resumable=True,
    )
    devices: int = knob(
        0, "Number of devices, the first ones, that run only the student; 0 shares all devices.", ge=0, resumable=True
    )
    layer_drop: float = knob(0.0, "LayerDrop: probability that a layer is skipped in a training step.", ge=0, lt=1)
    layer_drop_depth: Literal["constant", "linear"] = knob(
        "constant", "Probability by depth: the same for all layers, or growing linearly to `layer_drop` at the last."
    )
    layer_drop_schedule: Literal["constant", "linear"] = knob(
        "constant", "Probability by step: the same at all steps, or growing linearly from 0 to `layer_drop`."
    )

    def check(self) -> None:
        _check_attention(self, "student")
        sizes = {name: value for name in SIZES if (value := getattr(self, name))}
        if sizes and self.init != "importance":
            said = ", ".join(f"config.student.{name}={value}" for name, value in sizes.items())
            raise UserError(
                f"{said}: sizes are cut by config.student.init=importance, and it is {self.init}; set that, or for a "
                "random student config.student.overrides"
            )
        if self.init == "importance" and not (sizes or self.name):
            raise UserError(
                "config.student.init=importance, and nothing says what to cut: set config.student.width, inner or "
                "heads, or init to teacher, which keeps the teacher's sizes"
            )


class TokenizerConfig(Section):
    """The tokenizer that both models share."""

    name: str = knob(
        "",
        f"{_NAME}; empty takes the teacher's tokenizer, or the student's where there is no teacher.",
        resumable="content",
    )
    revision: str = knob("", "Branch, tag or commit, where `name` is a hub name.", resumable="content")


def _check_attention(side: TeacherConfig | StudentConfig, role: str) -> None:
    if side.attention == "cudnn" and side.dtype != "bfloat16":
        raise UserError(
            f"config.{role}.attention=cudnn takes 16 bits, and config.{role}.dtype={side.dtype}; "
            "set that to bfloat16, or attention to xla"
        )
