"""Which processes belong together: as flags, variables of the environment or the cluster's scheduler say."""

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import UserError

FLAGS = ("--coordinator", "--processes", "--process-id", "--process-timeout")
PATIENCE = 120  # seconds; the default of --process-timeout


class Cluster(NamedTuple):
    """Which processes belong together, as flags or the environment say; None and "" where neither does."""

    coordinator: str = ""  # host:port of process 0
    processes: int | None = None
    process_id: int | None = None
    timeout: int = PATIENCE  # seconds


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "On TPU pods, Slurm, Open MPI and Kubernetes the processes find each other by themselves. Elsewhere, start the "
        "same command on every host with these flags, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID in the environment.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", default="", help="address of process 0; any free port")
    group.add_argument("--processes", metavar="N", type=int, help="number of processes")
    group.add_argument("--process-id", metavar="I", type=int, help="number of this process, from 0")
    group.add_argument(
        "--process-timeout",
        metavar="SECONDS",
        type=int,
        default=PATIENCE,
        help="how long to wait for the others at the start, and after how long a silent one is lost; default: "
        "%(default)s",
    )


def flag_in(argv: Sequence[str]) -> str:
    """The first flag of `add_flags` among arguments; "" where there is none."""
    return next((name for argument in argv if (name := argument.partition("=")[0]) in FLAGS), "")


def cluster_of(flags: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Cluster:
    """The processes that the flags of `add_flags`, or else variables of the environment, name.

    Raises:
      UserError: a value that cannot be meant.
    """

    def number(flag: int | None, name: str) -> int | None:
        text = environment.get(name, "")
        if flag is not None or not text:
            return flag
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name}={text!r} must be a number; correct or unset it")
        return int(text)

    cluster = Cluster(
        flags.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", ""),
        number(flags.processes, "JAX_NUM_PROCESSES"),
        number(flags.process_id, "JAX_PROCESS_ID"),
        flags.process_timeout,
    )
    if cluster.timeout < 1:
        raise UserError(f"--process-timeout {cluster.timeout} must be 1 second or more")
    if cluster.processes is not None and cluster.processes < 1:
        raise UserError(f"--processes {cluster.processes} must be 1 or more")
    return cluster


def completed(cluster: Cluster) -> Cluster:
    """What the cluster's scheduler says, where flags and environment do not. A single task has nobody to look for."""
    if cluster.processes == 1 or (None not in cluster[1:3] and cluster.coordinator):
        return cluster
    from jax._src import clusters, xla_bridge

    if xla_bridge.backends_are_initialized() and not cluster.coordinator:
        return cluster  # a Python program that has begun to compute alone
    with warnings.catch_warnings(action="ignore"):  # in a pod without the package that a job of several would need
        found = next((kind for kind in clusters.ClusterEnv._cluster_types if _is_here(kind)), None)
    if found is None:
        return cluster
    processes = found.get_process_count() if cluster.processes is None else cluster.processes
    if processes == 1:
        return cluster._replace(processes=1)
    port = os.environ.get("JAX_COORDINATOR_PORT")
    address = cluster.coordinator or found.get_coordinator_address(
        timeout_secs=cluster.timeout, override_coordinator_port=port
    )
    number = found.get_process_id() if cluster.process_id is None else cluster.process_id
    return cluster._replace(coordinator=address, processes=processes, process_id=number)


def _is_here(kind: Any) -> bool:
    if kind.opt_in_only_method:
        return False
    # Any pod has Kubernetes' variables; only those of an indexed job belong together.
    if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    return kind.is_env_present()


def check_cluster(cluster: Cluster) -> None:
    """Checks that the values go together.

    Raises:
      UserError: one is missing, or out of range.
    """
    given = {
        "--coordinator": cluster.coordinator or None,
        "--processes": cluster.processes,
        "--process-id": cluster.process_id,
    }
    if missing := [flag for flag, value in given.items() if value is None]:
        raise UserError(
            f"{' and '.join(flag for flag in given if flag not in missing)} without {' and '.join(missing)}: no "
            "cluster was detected here that says the rest; give all three"
        )
    assert cluster.processes is not None and cluster.process_id is not None
    if not 0 <= cluster.process_id < cluster.processes:
        raise UserError(
            f"--process-id {cluster.process_id} of --processes {cluster.processes}: it must be 0 to "
            f"{cluster.processes - 1}"
        )
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {cluster.coordinator!r} must be HOST:PORT, such as 10.0.0.1:8476")


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this process by number: [] = all that it sees; None = as JAX finds them.

    Where a scheduler counts the processes of a host, JAX gives each the GPU of its own number. That is wrong where a
    process is the only one of its host, and where the scheduler shows to each process its own GPU alone, as number 0.
    """
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_alone = {number.partition("(")[0] for number in tasks.split(",")} == {"1"}  # Slurm writes 1(x2) for 1,1
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    sees_one = bool(visible) and "," not in visible
    return [] if "JAX_LOCAL_DEVICE_IDS" not in environment and (is_alone or sees_one) else None
