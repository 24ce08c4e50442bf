#!/usr/bin/env bash
# Runs the Python example against a daemon of its own. Needs the built binary (target/release/sluice), python3 and PyPI.
set -euo pipefail
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-../../../target}
daemon=${1:-$target/release/sluice}

if [ ! -x "$target/python-example/bin/python" ]; then
    python3 -m venv "$target/python-example"
fi
"$target/python-example/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt

folder=$(mktemp -d /dev/shm/sluice-python-XXXXXX)
"$daemon" serve --format json --http off --socket "$folder/sluice.sock" --arena "$folder/arena" --arena-bytes 64MiB \
    --set arena.segment_bytes=16MiB --set arena.open_bytes=64MiB --set limits.sequences=16 --log warn >"$folder/ready" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; wait "$pid" || true; rm -rf "$folder"' EXIT
for _ in $(seq 200); do
    if [ -s "$folder/ready" ]; then break; fi
    sleep 0.05
done
"$target/python-example/bin/python" decode.py "unix:$folder/sluice.sock"
kill "$pid"
wait "$pid"
echo "python example: passed"
