# `onerec-hf serve` as a container, from the wheel in dist/ (python3 .ci/release.py, or python -m build).
#     docker build -t onerec-hf-serve .
#     docker run --read-only --tmpfs /tmp -v "$PWD/my-model:/model:ro" -e ONEREC_HF_TOKEN -p 8000:8000 onerec-hf-serve
# Options of `onerec-hf serve` replace the CMD below. For a GPU, pass --build-arg PIP_EXTRA_INDEX_URL= and run with --gpus all.
FROM python:3.11-slim

# PyTorch's CPU build: the default one brings gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /srv
COPY dist/*.whl wheel/
RUN pip install --no-cache-dir "$(echo wheel/onerec_hf-*.whl)[serve]"
RUN useradd --system --no-create-home --uid 10001 onerec

USER 10001
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HOME=/tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["onerec-hf", "serve"]
CMD ["--model", "/model", "--host", "0.0.0.0", "--port", "8000"]
