#!/usr/bin/env bash
# Builds Sluice and runs the main job: 256K tokens, dense and sparse decode steps, beside floors measured in the same run.
# Further arguments go to `sluice-bench stress` (see its --help).
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked --bin sluice --bin sluice-bench
exec target/release/sluice-bench stress --context 256Ki --layers 4 --ratio 1/16 --ratio 1/64 --attach direct "$@"
