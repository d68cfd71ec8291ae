"""The proof that an exported folder is right: read back as any user's folder would be, it gives the same logits."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.models import hub, stored, weights
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import Model, build_model
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer
from jaxdistill.step import sharding

# float32 is stored exactly and both models run in the same compiled program, so the difference should be 0; 1e-5 is
# room for a backend whose sums have no fixed order, and a thousandth of the difference that one wrong tensor makes.
TOLERANCE = 1e-5


def reread_difference(folder: Path, *, model: Model, params: PyTree, probe: Mapping[str, np.ndarray]) -> float:
    """The largest difference between the logits of the folder's model and of the model given, at real tokens.

    Args:
      probe: input_ids and attention_mask [batch, length] of real text.

    Raises:
      UserError: the folder cannot be read.
    """
    written = build_model(hub.load_config(folder), dtype=jnp.float32, classes=model.classes)
    check_tokenizer(load_tokenizer(folder), written.config)
    reread = weights.open_params(folder, written)
    inputs = Inputs(jnp.asarray(probe["input_ids"]), jnp.asarray(probe["attention_mask"], bool))
    original = build_model(model.config, dtype=jnp.float32, classes=model.classes)
    expected = _logits(original, params, inputs)
    got = _logits(written, reread, inputs)
    return float(np.max(np.abs(expected - got), where=inputs.attention_mask[:, :, None], initial=0.0))


def _logits(model: Model, params: PyTree, inputs: Inputs) -> np.ndarray:
    mesh = sharding.local_mesh(params)
    params = stored.placed(params, sharding.on_mesh(params, mesh, family=model.family), jnp.float32)
    return np.asarray(jax.jit(lambda params, inputs: apply(model, params, inputs, mesh=mesh).logits)(params, inputs))
