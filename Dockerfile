# gtsa without network at run time: docs/docker.md. Build from a checkout: docker build --tag gtsa .
FROM python:3.12-slim AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN pip install --no-cache-dir "hatchling>=1.26" && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12-slim
COPY requirements.lock /tmp/requirements.lock
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir --requirement /tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && rm -r /tmp/requirements.lock /tmp/wheels \
    && useradd --create-home --uid 1000 gtsa
# No library may look for anything on the network: weights are files that you mount.
ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=/home/gtsa/huggingface PYTHONUNBUFFERED=1
USER gtsa
WORKDIR /home/gtsa
ENTRYPOINT ["gtsa"]
