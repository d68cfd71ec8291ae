"""The memory that a forward pass really takes, measured in a process of its own, where nothing else takes any.

What the compiler lays out leaves out what the allocator and the libraries of a kernel take beside it. The process makes
parameters of the same shapes, as memory does not depend on their values.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.evaluate.comparison import compiled_pass, inputs_of
from jaxdistill.models import hub
from jaxdistill.models.model import Model, build_model, param_shapes

_PATIENCE = 600  # seconds, in which a large model compiles
_STATUS = Path("/proc/self/status")
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU's memory would be taken whole
    "MALLOC_MMAP_THRESHOLD_": "65536",  # arrays in pages of their own, not in what compilation has left free
}


def measure_peak(model: Model, *, dtype: Any, rows: int, length: int) -> int | None:
    """Bytes of weights, inputs, results and temporaries at their peak; None where this cannot be measured.

    It cannot where the system does not say what a process takes, or where a device serves one process alone.

    Args:
      dtype: of the parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        asked = {
            "folder": folder,
            "build": {"attention": model.attention, "classes": model.classes, "scan": model.scan},
            "dtypes": [jnp.dtype(model.dtype).name, jnp.dtype(dtype).name],
            "inputs": [rows, length],
        }
        package = str(Path(__file__).parents[2])
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": package}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", __name__, json.dumps(asked)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return None
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _peak(asked: dict[str, Any]) -> int:
    computed, stored = map(jnp.dtype, asked["dtypes"])
    model = build_model(hub.load_config(Path(asked["folder"])), dtype=computed, **asked["build"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), param_shapes(model))
    device = jax.local_devices()[0]
    inputs = jax.device_put(inputs_of(*asked["inputs"]), device)
    run = compiled_pass(model, shapes, inputs)
    before = _resident("VmRSS")
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype) + 1, device), shapes)
    jax.block_until_ready(params)
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the highest is counted anew
    jax.block_until_ready(run(params, inputs))
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"]
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of this process in memory now (VmRSS), or at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


if __name__ == "__main__":
    print(_peak(json.loads(sys.argv[1])))
