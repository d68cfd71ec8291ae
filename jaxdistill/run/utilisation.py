"""How well a run uses its devices: tokens per second and device, and model FLOP utilisation (MFU)."""

from collections.abc import Callable

import jax

from jaxdistill.config import Config
from jaxdistill.models.arithmetic import forward_flops
from jaxdistill.models.pair import Pair
from jaxdistill.step.chips import chip_of

Rates = Callable[[float, float], dict[str, float]]  # (tokens per second, tokens of a row) -> figures


def rates_of(config: Config, pair: Pair) -> Rates:
    """Figures of speed on devices whose peak is known; none on others, such as CPUs.

    MFU is the arithmetic of the models themselves, three forward passes for the student and one for a teacher,
    without padding and without what is computed again, over the peak in bfloat16. It is not given where text is
    generated or layers are dropped, as their arithmetic is another in every step.
    """
    chip = chip_of(jax.devices()[0])
    if chip is None:
        return lambda tokens_per_s, length: {}
    devices, peak = jax.device_count(), chip.flops
    masked = not pair.student.family.causal and config.loss.tokens == "masked"
    share = config.mask.fraction if masked else 1.0

    def rates(tokens_per_s: float, length: float) -> dict[str, float]:
        figures = {"tokens_per_s_per_device": tokens_per_s / devices}
        if config.samples or config.student.layer_drop:
            return figures
        flops = 3 * forward_flops(pair.student, length=length, head_share=share)
        flops += sum(forward_flops(teacher, length=length, head_share=share) for teacher in pair.teachers)
        return figures | {"mfu": tokens_per_s * flops / (devices * peak)}

    return rates
