# jaxdistill for CPUs, NVIDIA GPUs and TPU VMs: three targets of one file, which differ in the extra of JAX alone, as the
# wheels of JAX bring CUDA and libtpu with them.
#
#   docker build --target cpu -t jaxdistill:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" jaxdistill:cpu \
#       train --config quickstart --workdir runs/quickstart
#
#   docker build --target cuda -t jaxdistill:cuda .     # run with --gpus all (NVIDIA's container toolkit)
#   docker build --target tpu -t jaxdistill:tpu .       # run with --privileged --net=host on the TPU VM
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY jaxdistill jaxdistill
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS base
# Any user may run it, so that run folders belong to who started it: caches lie in the mounted folder.
ENV HOME=/work PYTHONUNBUFFERED=1
WORKDIR /work
COPY --from=wheel /wheels /wheels
# As the first process, Python gets the SIGTERM of `docker stop`, on which a run saves a checkpoint.
STOPSIGNAL SIGTERM
ENTRYPOINT ["jaxdistill"]
CMD ["doctor"]

FROM base AS cuda
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[flax,cuda,rouge,tensorboard]"

FROM base AS tpu
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[flax,tpu,rouge,tensorboard]"

FROM base AS cpu
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[flax,rouge,tensorboard]"
