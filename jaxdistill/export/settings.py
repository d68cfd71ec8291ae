"""The knobs of the exported student."""

from typing import Literal

from jaxdistill.knobs import Section, knob


class ExportConfig(Section):
    """Folders for other programs."""

    to: tuple[Literal["pytorch", "flax"], ...] = knob(
        (), "Formats written at the end of the run to <workdir>/export-<format>: pytorch, flax.", resumable=True
    )
    license: str = knob(
        "", "Licence for the model card, such as apache-2.0; empty = stated as unknown.", resumable=True
    )
