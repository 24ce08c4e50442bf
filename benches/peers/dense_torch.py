"""PyTorch's dense attention over a cache that lies on the GPU, of one decode step and of a piece of a prompt: the peer of `sluice-bench gpu`.

    python3 benches/peers/dense_torch.py --context 262144 --layers 32

Prints one JSON object: milliseconds (median, best, worst) of a step by backend and context, and of a piece of a prompt after a prefix. Each is
one CUDA graph launch over all layers.
"""

import argparse
import itertools
import json
import statistics

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


def step_times(context, layers, backend, rounds):
    """Times of `rounds` steps over [1, 8, context, 128] keys and values a layer, 32 query heads, f16."""
    keys, values, query = caches(context, layers), caches(context, layers), rows(32, 1)

    def step():
        with sdpa_kernel(backend):
            for key, value in zip(keys, values):
                functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return graph_times(step, rounds)


def prefill_times(prefix, queries, layers, backend, mask, rounds):
    """The same of `queries` tokens that follow `prefix` tokens, each attending its own past ("causal") or, for backends without such a mask,
    all of them ("none": a 512th part more work at 512 queries over 128K tokens)."""
    keys, values, query = caches(prefix + queries, layers), caches(prefix + queries, layers), rows(32, queries)
    mask = causal_lower_right(queries, prefix + queries) if mask == "causal" else None

    def piece():
        with sdpa_kernel(backend):
            for key, value in zip(keys, values):
                functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    return graph_times(piece, rounds)


def rows(heads, tokens):
    return torch.randn(1, heads, tokens, 128, dtype=torch.float16, device="cuda")


def caches(tokens, layers):
    return [rows(8, tokens) for _ in range(layers)]


def graph_times(work, rounds):
    """Milliseconds of launches of a graph of `work`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(rounds + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times[3:]


def measured(times_of, entry):
    """`entry` with the times, or with the reason why there are none."""
    try:
        times = times_of()
        entry.update(step_ms=statistics.median(times), best_ms=min(times), worst_ms=max(times))
    except RuntimeError as error:
        entry["refused"] = str(error).splitlines()[0]
    torch.cuda.empty_cache()
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="*", default=[262144, 32768, 8192], help="tokens of decode steps")
    parser.add_argument("--prefix", type=int, nargs="*", default=[131072], help="tokens before a piece of a prompt")
    parser.add_argument("--queries", type=int, nargs="*", default=[16, 64, 256, 512], help="tokens of a piece")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    found = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "layers": arguments.layers, "steps": [], "prefill": []}
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    layers, rounds = arguments.layers, arguments.rounds
    for context, backend in itertools.product(arguments.context, backends):
        entry = {"context_tokens": context, "backend": backend.name}
        found["steps"].append(measured(lambda: step_times(context, layers, backend, rounds), entry))
    for prefix, queries, backend, mask in itertools.product(arguments.prefix, arguments.queries, backends, ["causal", "none"]):
        entry = {"prefix_tokens": prefix, "queries": queries, "backend": backend.name, "mask": mask}
        found["prefill"].append(measured(lambda: prefill_times(prefix, queries, layers, backend, mask, rounds), entry))
    print(json.dumps(found))


main()
