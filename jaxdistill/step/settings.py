"""The knobs of an update: its rows and its devices (those of its optimizer are in optimizer.py)."""

from typing import Annotated

from jaxdistill.errors import UserError
from jaxdistill.knobs import Rule, Section, knob
from jaxdistill.step.optimizer import Patterns


class TrainConfig(Section):
    """How long to train, and on how many rows at a time."""

    steps: int = knob(
        0, "Number of optimizer updates; 0 = as many as `epochs` takes.", ge=0, le=2**31 - 1, resumable="length"
    )
    epochs: float = knob(3.0, "Passes over the text, where steps is 0.", ge=0, le=1_000_000, resumable="length")
    limit_batches: int = knob(0, "Largest number of updates in an epoch; 0 = the whole text.", ge=0)
    batch_size: int = knob(32, "Rows in an update, over all devices.", ge=1, le=2**20)
    accumulation: int = knob(
        1,
        "Micro-batches that an update is computed in, which saves memory; 0 = the fewest that fit into the memory of a "
        "device, if it says how much it has.",
        ge=0,
        resumable=True,
    )
    freeze: Patterns = knob(
        (),
        "Regular expressions: parameters whose path, such as student/bert/embeddings/word_embeddings/embedding, "
        "contains a match are not trained.",
    )

    def check(self) -> None:
        if not (self.steps or self.epochs):
            raise UserError("config.train.steps and config.train.epochs are both 0; set one of them")


class MeshConfig(Section):
    """How devices share the work."""

    data: Annotated[int, Rule("must be -1 (all devices left) or at least 1", lambda n: n == -1 or n >= 1)] = knob(
        -1, "Number of devices that split the batch; -1 = all that `fsdp` and `tensor` leave.", resumable=True
    )
    fsdp: int = knob(
        1, "Number of devices that split both the batch and the parameters of both models.", ge=1, resumable=True
    )
    tensor: int = knob(
        1,
        "Number of devices that share the work on each row: heads, inner units and vocabulary of both models.",
        ge=1,
        resumable=True,
    )
    teacher_fsdp: int = knob(
        0,
        "Number of devices that split the teacher's parameters, in the place of `fsdp`; 0 = as `fsdp` says, 1 = every "
        "device has them all and gathers none.",
        ge=0,
        resumable=True,
    )
