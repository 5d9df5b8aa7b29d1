# Secateur on a CPU, with its kernels.
#
#     docker build -t secateur .
#     docker run --rm -v "$PWD":/work secateur prune MODEL --sparsity 0.5 --output SPARSE
#     docker run --rm -p 8000:8000 -v "$PWD":/work -e SECATEUR_API_KEY=… secateur serve SMALL --host 0.0.0.0

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[serve,lora]" \
    && rm -r /wheels \
    && useradd --create-home secateur
USER secateur
WORKDIR /work
ENTRYPOINT ["secateur"]
CMD ["--help"]
