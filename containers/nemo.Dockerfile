# NeMo-RL with this package, for clusters. From the root of a checkout:
#   docker build --file containers/nemo.Dockerfile --tag mopd-nemo:0.2.0 .
#   enroot import --output mopd-nemo.sqsh dockerd://mopd-nemo:0.2.0
FROM nvcr.io/nvidia/nemo-rl:v0.7.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0

# bubblewrap keeps model-written programs apart from the node. Its version is whatever the image's Ubuntu has.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mopd-nemo
COPY pyproject.toml README.md ./
COPY mopd_nemo mopd_nemo

# What the driver needs, into NeMo-RL's own environment, whose packages all stay as they are. The job brings its copy of
# this package and puts it first, so the one installed here only serves runs without `mopd submit`.
RUN uv pip freeze --python /opt/nemo_rl_venv/bin/python | grep '^[A-Za-z0-9_.-]*==' > /tmp/pins.txt \
 && uv pip install --no-cache --python /opt/nemo_rl_venv/bin/python --constraint /tmp/pins.txt . \
 && rm /tmp/pins.txt \
 && /opt/nemo_rl_venv/bin/python -c 'import mopd_nemo.cli, ray, torch'

# pyxis runs the container as the user who submitted the job; the interpreters that uv keeps in root's home must be readable.
RUN chmod a+rx "$HOME" && chmod --recursive a+rX "$HOME/.local"
USER 1000:1000
