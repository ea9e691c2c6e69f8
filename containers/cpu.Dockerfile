# The quickstart and the tests on CPUs. From the root of a checkout:
#   docker build --file containers/cpu.Dockerfile --tag mopd-nemo-cpu:0.2.0 .
#   docker run --rm mopd-nemo-cpu:0.2.0
# PIP_ARGS is handed to pip, for example to choose an index with CPU builds of torch.
FROM python:3.12.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 mopd \
 && install --directory --owner=1000 --group=1000 /home/mopd/mopd-nemo

WORKDIR /home/mopd/mopd-nemo
COPY --chown=1000:1000 . .

ARG PIP_ARGS=""
# hadolint ignore=SC2086
RUN pip install --no-cache-dir --constraint constraints-cpu.txt ${PIP_ARGS} --editable '.[test]'

USER 1000:1000
ENV OMP_NUM_THREADS=1
CMD ["mopd", "train", "--config", "configs/quickstart.yaml"]
