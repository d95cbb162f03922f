# Builds from the same pins as `make run`. Serves on the container's loopback only, because accounts do not exist yet:
#   docker build -t zephyr-loop . && docker run --rm --network host -v zloop-data:/data zephyr-loop
FROM python:3.11-slim-bookworm

# An index to take torch from, for example PyTorch's CPU index; empty: the usual one.
ARG TORCH_INDEX_URL=

# llama-server needs OpenMP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 zloop && install -d -o zloop /data
WORKDIR /srv/zephyr-loop
RUN chown zloop .
USER 1000

COPY --chown=zloop pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY --chown=zloop scripts/setup.sh scripts/
COPY --chown=zloop feedback_store feedback_store
COPY --chown=zloop trainer trainer
COPY --chown=zloop chat_app chat_app
RUN make setup

ENV ZLOOP_DATA_DIR=/data
VOLUME /data
EXPOSE 7860
CMD [".venv/bin/zloop", "serve"]
