# docker build -t motserve .
# docker run --rm -p 8000:8000 motserve
#
# The torch that pip installs by default on x86-64 Linux brings CUDA along. Build arguments choose otherwise:
#   PIP_EXTRA_INDEX_URL  a package index that has CPU builds of torch, for a much smaller image; they win over the default
#   BASE                 any Debian or Ubuntu image that has Python 3.11 or newer or can install it. For NVIDIA's own base:
#                        --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04, run with `docker run --gpus all …`
# Flags follow the image's name: docker run … motserve serve --private force
ARG BASE=python:3.12-slim
FROM ${BASE}

# The compiler builds the kernels at the first start, for the processor that the container finds itself on.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && (python3 -m venv --help > /dev/null 2>&1 && python3 -m ensurepip --version > /dev/null 2>&1 \
        || apt-get install -y --no-install-recommends python3 python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/motserve
ENV PATH=/opt/motserve/bin:$PATH

ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
# torch first: it is nearly all of the download, and this layer outlives changes of the code.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .

RUN useradd --system --create-home motserve
USER motserve
WORKDIR /home/motserve
ENV MOTSERVE_HOST=0.0.0.0 MOTSERVE_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['MOTSERVE_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["motserve"]
CMD ["serve"]
