# A worker: the only image with torch. Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t llmos-worker .
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends g++=4:12.2.0-3 && rm -rf /var/lib/apt/lists/*
COPY . .
RUN python -m venv /opt/llmos && /opt/llmos/bin/pip install -c constraints.txt '.[worker,store,certs]'

FROM python:3.11.14-slim-bookworm
# Triton compiles for the card that it finds.
RUN apt-get update && apt-get install -y --no-install-recommends g++=4:12.2.0-3 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --home-dir /var/lib/llmos --shell /usr/sbin/nologin llmos \
    && install -d -o 10001 -g 10001 /var/lib/llmos/store /var/lib/llmos/certs
COPY --from=build /opt/llmos /opt/llmos
USER 10001:10001
WORKDIR /var/lib/llmos
ENV PATH=/opt/llmos/bin:$PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/var/lib/llmos/store/triton
EXPOSE 9100
ENTRYPOINT ["python", "-m", "worker"]
