# docker build -t advml .                                   for the processor
# docker build -t advml:cuda --build-arg BACKEND=cu130 .    for a GPU; run it with --gpus all
# docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/study" advml init digits
FROM python:3.12-slim
ARG BACKEND=cpu
# git of any version does. The study's folder belongs to the user outside, who has no home in here but this one.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.9 \
    && git config --system --add safe.directory /study \
    && useradd --create-home --uid 1000 advml && chmod 777 /home/advml && install -d -o advml /study
WORKDIR /opt/advml
# Dependencies first: after a change of the sources these layers are reused. The lock only constrains versions, as it lists wheels for GPUs.
COPY pyproject.toml requirements.lock ./
RUN uv pip install --system --no-cache --compile-bytecode --torch-backend "${BACKEND}" -r pyproject.toml -c requirements.lock
COPY README.md LICENSE dvc.yaml ./
COPY src src
RUN uv pip install --system --no-cache --compile-bytecode --no-deps .
ENV HOME=/home/advml USER=advml DVC_NO_ANALYTICS=1
WORKDIR /study
USER 1000
ENTRYPOINT ["advml"]
CMD ["--help"]
