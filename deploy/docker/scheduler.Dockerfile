# The scheduler: small, no torch. Build from the repository's root:
#   docker build -f deploy/docker/scheduler.Dockerfile -t llmos-scheduler .
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY . .
RUN python -m venv /opt/llmos && /opt/llmos/bin/pip install -c constraints.txt '.[scheduler]'

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/llmos --shell /usr/sbin/nologin llmos
COPY --from=build /opt/llmos /opt/llmos
USER 10001:10001
WORKDIR /var/lib/llmos
ENV PATH=/opt/llmos/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 7000
ENTRYPOINT ["python", "-m", "scheduler"]
