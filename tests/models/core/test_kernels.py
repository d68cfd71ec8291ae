"""Every kernel computes the same attention, and each is taken where it can serve."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from attention_rows import ROWS, arrays, close, graded, written

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.models.core.attention import Attended, Reach, platform
from jaxdistill.models.core.kernels import KERNELS, attend, kernel_for
from jaxdistill.models.flax.supported import has_flax_class
from jaxdistill.models.model import build_model_for
from jaxdistill.models.settings import StudentConfig
from jaxdistill.run.training import check_evaluation
from jaxdistill.step.sharding import make_mesh


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("name", ["own", "xla", "tiles"])
def test_value_and_gradient(name: str, cap: float) -> None:
    row = ROWS["packed and padded"]
    arguments = (*arrays(48), row, row, Reach(before=9))
    close(*(graded(run, cap=cap)(*arguments) for run in (partial(attend, name), written)), 1e-5)


def shapes(queries: int, keys: int, reach: Reach, size: int = 64) -> Attended:
    """What attention is asked for, without numbers."""
    query, key = (jax.ShapeDtypeStruct((2, length, 4, size), jnp.float32) for length in (queries, keys))
    fields: Any = (query, key, key, None, None, reach)
    return Attended(*fields)


TRACED = Reach(before=jnp.int32(7))
CHOICES = {  # asked for, platform, queries, keys, reach, cap -> what runs
    "short": (("xla", "cpu", 128, 128, Reach(), 0.0), "xla"),
    "short, with a cap": (("xla", "cpu", 128, 128, Reach(), 30.0), "own"),
    "long": (("xla", "cpu", 512, 512, Reach(), 0.0), "tiles"),
    "long, with a cap": (("xla", "cpu", 512, 512, Reach(), 30.0), "tiles"),
    "as long, on a chip where it is not": (("xla", "tpu", 512, 512, Reach(), 0.0), "xla"),
    "one query of a long cache": (("xla", "cpu", 1, 4096, Reach(), 0.0), "xla"),
    "named": (("own", "cpu", 4096, 4096, Reach(), 0.0), "own"),
    "splash": (("splash", "tpu", 2048, 2048, Reach(before=100), 30.0), "splash"),
    "splash with a cache": (("splash", "tpu", 1, 2048, Reach(), 0.0), "xla"),
    "splash with a reach that is traced": (("splash", "tpu", 2048, 2048, TRACED, 0.0), "tiles"),
    "cudnn": (("cudnn", "gpu", 512, 512, Reach(), 0.0), "cudnn"),
    "cudnn with a cap": (("cudnn", "gpu", 512, 512, Reach(), 30.0), "own"),
    "cudnn with a cap, long": (("cudnn", "gpu", 4096, 4096, Reach(), 30.0), "tiles"),
}


@pytest.mark.parametrize(("asked", "runs"), CHOICES.values(), ids=CHOICES)
def test_the_kernel_that_runs(asked: tuple[Any, ...], runs: str) -> None:
    name, where, queries, keys, reach, cap = asked
    assert kernel_for(name, shapes(queries, keys, reach), platform=where, cap=cap) == runs


@pytest.mark.parametrize(("size", "runs"), [(64, "cudnn"), (256, "cudnn"), (6, "xla"), (264, "xla")])
def test_cudnn_runs_heads_of_its_sizes(size: int, runs: str) -> None:
    assert kernel_for("cudnn", shapes(128, 128, Reach(), size), platform="gpu", cap=0.0) == runs


def test_platform() -> None:
    """Of the mesh, where the program is compiled for devices that are not here."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    assert platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"


def test_cudnn_is_lowered_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checks shapes and types: one of its kernels forward and one backward."""
    from jax._src.cudnn import fused_attention_stablehlo  # which asks for the version that is installed here

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)
    row = ROWS["packed and padded"]
    kernels = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    run = jax.export.export(graded(KERNELS["cudnn"]), platforms=["cuda"], disabled_checks=allowed)
    text = run(*arrays(48, dtype=jnp.bfloat16), row, row, Reach()).mlir_module()
    assert [text.count(f"@{name}(") for name in kernels] == [1, 1]


def test_splash_is_refused_where_there_is_no_tpu() -> None:
    config = Config().changed(student={"attention": "splash"})
    with pytest.raises(UserError, match=r"student\.attention=splash is a kernel of TPUs, not of cpu; set xla"):
        check_evaluation(config, make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]))


@pytest.mark.skipif(not has_flax_class("llama"), reason="the installed transformers has no Flax classes")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "tiles"}, "attention=tiles is a kernel of classes=core, not of Flax classes"),
        ({"attention": "splash"}, "attention=splash is a kernel of classes=core, not of Flax classes"),
        ({"scan": True}, "scan=True is for classes=core, and not for Flax classes"),
    ],
)
def test_what_the_flax_classes_do_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}: set classes to core, or set "):
        build_model_for(tiny.config("llama"), StudentConfig(**settings))
