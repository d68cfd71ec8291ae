"""The knobs of the exported student."""

from typing import Annotated

from jaxdistill.export.folder import FORMATS
from jaxdistill.knobs import OneOf, Section, knob


class ExportConfig(Section):
    """Folders for other programs."""

    to: Annotated[tuple[str, ...], OneOf(FORMATS)] = knob(
        (), "Formats written at the end of the run to <workdir>/export-<format>: pytorch, flax.", resumable=True
    )
    license: str = knob(
        "",
        "Licence for the model card, such as apache-2.0; empty = that of the models that the student was made from.",
        resumable=True,
    )
