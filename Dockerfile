# syntax=docker/dockerfile:1
# Stage 1 fetches what the lock names, each file checked against its hash, and builds the wheel.
# Stage 2 takes from that, without the network, what the wheel needs: the lock also holds the tools for tests, the image does not.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements.lock ./
RUN pip download --quiet --only-binary :all: --no-deps --require-hashes --dest /wheels -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY schemas ./schemas
COPY sidecar ./sidecar
RUN pip install --quiet --no-index --find-links /wheels hatchling \
 && pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist . \
 && python -m venv /opt/sidecar \
 && /opt/sidecar/bin/pip install --quiet --no-index --find-links /wheels "$(ls /dist/*.whl)[pkcs11,vault,aws]" \
 && /opt/sidecar/bin/pip uninstall --quiet --yes pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="sidecar" org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 sidecar \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sidecar \
 && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/sidecar
COPY --from=build /opt/sidecar /opt/sidecar
ENV PATH=/opt/sidecar/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SIDECAR_CONFIG=/etc/sidecar/sidecar.yaml
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["sidecar"]
CMD ["run"]
