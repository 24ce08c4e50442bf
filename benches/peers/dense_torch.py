"""PyTorch's dense attention of one decode step over a cache that lies on the GPU: the peer of `sluice-bench gpu`'s dense contestant.

    python3 benches/peers/dense_torch.py --context 262144 --layers 32

Prints one JSON object: milliseconds a step (median, best, worst) by backend and context. Each step is one CUDA graph launch over all layers.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def step_times(context, layers, backend, rounds):
    """Times of `rounds` steps over [1, 8, context, 128] keys and values a layer, 32 query heads, f16."""
    make = lambda heads, tokens: torch.randn(1, heads, tokens, 128, dtype=torch.float16, device="cuda")
    keys, values, query = [make(8, context) for _ in range(layers)], [make(8, context) for _ in range(layers)], make(32, 1)

    def step():
        with sdpa_kernel(backend):
            for key, value in zip(keys, values):
                functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(rounds + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times[3:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[262144, 32768, 8192], help="tokens")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "layers": arguments.layers, "steps": []}
    for context in arguments.context:
        for backend in [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]:
            entry = {"context_tokens": context, "backend": backend.name}
            try:
                times = step_times(context, arguments.layers, backend, arguments.rounds)
                entry.update(step_ms=statistics.median(times), best_ms=min(times), worst_ms=max(times))
            except RuntimeError as error:
                entry["refused"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
            found["steps"].append(entry)
    print(json.dumps(found))


main()
