"""Exports a trained model to a folder, which appears only after it was read back and gave the same logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import processes
from jaxdistill.errors import UserError
from jaxdistill.export.folder import write_folder
from jaxdistill.export.proof import TOLERANCE, reread_difference
from jaxdistill.files import folder_beside, refusal
from jaxdistill.models.model import Model


def export(
    *,
    model: Model,
    params: Mapping[str, Any],
    tokenizer: Any,
    out: Path,
    to: str,
    card: str,
    probe: Mapping[str, np.ndarray],
) -> None:
    """Writes config.json, weights, tokenizer files and the model card to the folder `out`; torch is not needed.

    The folder is written beside `out` and renamed to `out` after the proof, so a failure leaves nothing. What a
    killed process leaves is removed by the next export beside it. Of several processes, the first one writes.

    Tensors are brought to the host one after the other, from files or from the devices that hold their parts; the
    proof reads the folder onto the devices of this process.

    Args:
      params: may be tensors of files (models/stored.py), or lie on any devices of this process.
      to: format of the weights, one of export.folder.FORMATS.
      card: text of README.md, from export.card.model_card.
      probe: input_ids and attention_mask [batch, length] of real text, on which logits are compared.

    Raises:
      UserError: `out` is in use, cannot be written, or reads back with other logits.
    """
    if not processes.is_first():
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another --out, nothing is written over")
    try:
        with folder_beside(out) as temporary:
            write_folder(temporary, model=model, params=params, tokenizer=tokenizer, to=to, card=card)
            difference = reread_difference(temporary, model=model, params=params, probe=probe)
            if not difference <= TOLERANCE:  # also where it is NaN
                raise UserError(
                    f"export: the folder reads back with logits up to {difference:.3g} off the checkpoint's, "
                    f"{TOLERANCE:g} are allowed; {out} was not written"
                )
            temporary.rename(out)
    except Exception as error:
        if reason := refusal(error):
            raise UserError(f"cannot write {out}: {reason}; nothing is left of it") from error
        raise
