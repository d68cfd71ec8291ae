"""The memory that a process may have: the least of the machine's, its control groups' and the shell's."""

import os
import resource

import jax
import pytest
import tiny
from refusal import refused

from jaxdistill.models import model as models
from jaxdistill.models.host_memory import memory_allowed

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NO_LIMIT = 9223372036854771712  # what version 1 says
MB = 1 << 20

# What stands in /proc/self/cgroup, the files of limits, and the least of them.
GROUPS = {
    "none": ("", {}, MACHINE),
    "version 2": ("0::/job\n", {"job/memory.max": 64 * MB}, 64 * MB),
    "version 2, a limit further up": ("0::/a/b\n", {"a/memory.max": 64 * MB, "a/b/memory.max": "max"}, 64 * MB),
    "version 2, in a container": ("0::/as/the/host/sees/it\n", {"memory.max": 32 * MB}, 32 * MB),
    "version 2, no limit": ("0::/\n", {"memory.max": "max"}, MACHINE),
    "version 1": (
        "9:name=systemd:/x\n5:cpu,memory:/job\n0::/\n",
        {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/job/memory.limit_in_bytes": 16 * MB},
        16 * MB,
    ),
    "version 1, another controller": ("5:cpu:/job\n", {"memory/job/memory.limit_in_bytes": 16 * MB}, MACHINE),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_least_limit_counts(tmp_path, name):
    groups, files, least = GROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for file, limit in files.items():
        path = tmp_path / "sys/fs/cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    assert memory_allowed(tmp_path) == least


def test_the_limit_of_the_shell_counts(tmp_path, monkeypatch):
    assert memory_allowed(tmp_path) == MACHINE
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 * MB, resource.RLIM_INFINITY))
    assert memory_allowed(tmp_path) == 8 * MB


def test_random_parameters_that_do_not_fit_are_refused_before_they_are_drawn(monkeypatch):
    monkeypatch.setattr(models, "memory_allowed", lambda: 1000)
    model, key = models.build_model(tiny.config("bert")), jax.random.key(0)
    refused(lambda: models.init_params(model, key), "this process may have 1,000 bytes")
