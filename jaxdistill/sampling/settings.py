"""The knobs of text that models write in training."""

from jaxdistill.errors import UserError
from jaxdistill.knobs import Section, knob


class SampleConfig(Section):
    """Text that causal models write during training, to learn from."""

    student: float = knob(
        0.0, "Share of the updates that learn from completions written by the student (lambda of GKD).", ge=0, le=1
    )
    teacher: float = knob(
        0.0,
        "Share of the updates that learn from completions written by the teacher (1.0: sequence-level distillation).",
        ge=0,
        le=1,
    )
    max_new_tokens: int = knob(
        64, "Largest number of tokens of a completion; its prompt may have the rest of data.max_length.", ge=1
    )
    prompt_tokens: int = knob(
        0, "Number of tokens at the start of a row that are its prompt; 0 = those of data.prompt_column.", ge=0
    )
    temperature: float = knob(1.0, "Softmax temperature of sampling; 0 always takes the likeliest token.", ge=0)
    top_k: int = knob(0, "Sample from the k likeliest tokens; 0 = from all.", ge=0)
    top_p: float = knob(1.0, "Sample from the fewest tokens that have this probability together.", gt=0, le=1)

    def check(self) -> None:
        if self.student + self.teacher > 1:
            raise UserError(
                f"config.sample.student={self.student:g} and config.sample.teacher={self.teacher:g} are shares of "
                "the updates, and add up to more than 1"
            )
