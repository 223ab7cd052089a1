# docker build -t advml .                              for the processor
# docker build -t advml:cuda --build-arg BACKEND=cu130 .    for a GPU; run it with --gpus all
# docker run --rm -it -v "$PWD:/study" advml init digits
FROM python:3.12-slim
ARG BACKEND=cpu
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv
WORKDIR /opt/advml
COPY pyproject.toml README.md LICENSE dvc.yaml ./
COPY src src
RUN uv pip install --system --no-cache --compile-bytecode --torch-backend ${BACKEND} .
WORKDIR /study
# The study's folder belongs to the user outside.
RUN git config --system --add safe.directory /study
ENTRYPOINT ["advml"]
CMD ["--help"]
