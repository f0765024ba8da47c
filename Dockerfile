# Tandem's image, for routers and workers of deploy/kubernetes/chart. Everything has the versions of constraints.txt.
#
#   docker build --target cuda -t tandem-serve:0.1.0 .
#   docker build --target cpu -t tandem-serve:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# The CPU image has a compiler: Tandem compiles its kernels for the processor on which they run. For a build that can be
# repeated bit by bit, give the base image by digest (--build-arg PYTHON_IMAGE=python@sha256:...) and SOURCE_DATE_EPOCH.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG SOURCE_DATE_EPOCH=0
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Of the base image's Python; pip itself stays outside. With SOURCE_DATE_EPOCH, compiled files contain no dates.
RUN python -m venv --without-pip /opt/tandem
WORKDIR /src
COPY constraints.txt ./
RUN python -m pip --python /opt/tandem/bin/python install -c constraints.txt \
      ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN python -m pip --python /opt/tandem/bin/python install -c constraints.txt huggingface_hub
COPY . ./
RUN python -m pip wheel --no-deps -c constraints.txt --wheel-dir /tmp/wheel . \
    && python -m pip --python /opt/tandem/bin/python install -c constraints.txt \
      "$(echo /tmp/wheel/tandem_serve-*.whl)[serve,ray,kubernetes]" \
    && ln -s "$(/opt/tandem/bin/python -P -c 'import tandem.models; print(tandem.models.__path__[0])')" /opt/tandem/models

FROM ${PYTHON_IMAGE} AS cuda
COPY --from=packages /opt/tandem /opt/tandem
# No home folder and a read-only root: what is written at run time goes to /tmp.
ENV PATH=/opt/tandem/bin:$PATH HOME=/tmp XDG_CACHE_HOME=/tmp/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 8001 8002 8003
ENTRYPOINT ["tandem"]
CMD ["--help"]

FROM cuda AS cpu
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
USER 10001:10001
