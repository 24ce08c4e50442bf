"""Registers a small model, appends rows, decodes tokens over them and compares the output with dense attention in numpy.

    python decode.py unix:/tmp/sluice-1000/sluice.sock
"""

import sys

import numpy as np

from sluice import Sluice

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64
PROMPT_TOKENS, DECODED_TOKENS, RUN_TOKENS = 1000, 4, 300
SCALE = HEAD_DIM**-0.5
TOLERANCE = 1e-4


def main(target):
    sluice = Sluice(target)
    model = register(sluice)
    rng = np.random.default_rng(7)
    tokens = PROMPT_TOKENS + DECODED_TOKENS
    # [layer][lane][token][key and value]: a row is a key followed by its value.
    rows = rng.standard_normal((LAYERS, KV_HEADS, tokens, 2 * HEAD_DIM), dtype=np.float32)
    queries = rng.standard_normal((LAYERS, tokens, QUERY_HEADS, HEAD_DIM), dtype=np.float32)
    # New ids at every run, so that nothing of an earlier run is found.
    ids = np.random.default_rng().integers(0, 1 << 31, tokens).tolist()

    opened = sluice.Open(sluice.message("OpenRequest", model_id=model, token_ids=ids[:PROMPT_TOKENS]))
    assert opened.matched_tokens == 0
    appended = sluice.Append(append_requests(sluice, opened.lease, rows, ids))
    print(f"appended {appended.committed_tokens} tokens, {appended.appended_bytes} bytes")

    worst = 0.0
    positions = range(PROMPT_TOKENS, tokens)
    requests = [(position, layer) for position in positions for layer in range(LAYERS)]
    replies = sluice.Decode(decode_request(sluice, opened.lease, position, layer, rows, queries, ids) for position, layer in requests)
    for (position, layer), reply in zip(requests, replies, strict=True):
        result = reply.results[0]
        if result.error.code:
            raise RuntimeError(result.error.message)
        output = np.frombuffer(result.output, np.float32).reshape(QUERY_HEADS, HEAD_DIM)
        expected, log_sum_exp = dense_attention(queries[layer, position], rows[layer, :, : position + 1])
        error = max(np.abs(output - expected).max(), np.abs(np.frombuffer(result.log_sum_exp, np.float32) - log_sum_exp).max())
        print(f"token {position} layer {layer}: output {np.round(output[0, :4], 4)} differs from numpy by {error:.1e}")
        worst = max(worst, float(error))

    sluice.Close(sluice.message("CloseRequest", lease=opened.lease))
    again = sluice.Open(sluice.message("OpenRequest", model_id=model, token_ids=ids[:PROMPT_TOKENS]))
    print(f"opened again: {again.matched_tokens} of {PROMPT_TOKENS} tokens are held already")
    sluice.Close(sluice.message("CloseRequest", lease=again.lease))
    assert again.matched_tokens == PROMPT_TOKENS // 256 * 256, "full chunks are kept"
    assert worst < TOLERANCE, f"{worst} is not below {TOLERANCE}"
    print("ok")


def register(sluice):
    layer = sluice.message(
        "LayerSpec", attention="ATTENTION_KIND_MHA_GQA", query_heads=QUERY_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    model = sluice.message(
        "ModelSpec",
        name="python-example",
        weights_digest=b"python-example",
        row_type="ROW_TYPE_F32",
        rotary_layout="ROTARY_LAYOUT_NONE",
        layers=[layer] * LAYERS,
    )
    return sluice.RegisterModel(sluice.message("RegisterModelRequest", model=model)).model_id


def append_requests(sluice, lease, rows, ids):
    """One message is one layer of a run of tokens."""
    for first in range(0, PROMPT_TOKENS, RUN_TOKENS):
        last = min(first + RUN_TOKENS, PROMPT_TOKENS)
        for layer in range(LAYERS):
            yield sluice.message(
                "AppendRequest",
                lease=lease,
                layer=layer,
                first_position=first,
                rows=rows[layer, :, first:last].tobytes(),
                token_ids=ids[first:last] if layer == 0 else [],
            )


def decode_request(sluice, lease, position, layer, rows, queries, ids):
    """The new token's rows and queries of one layer. Without a calibration the daemon attends densely."""
    step = sluice.message(
        "SequenceStep",
        lease=lease,
        first_position=position,
        query_count=1,
        queries=queries[layer, position].tobytes(),
        rows=rows[layer, :, position].tobytes(),
        token_ids=[ids[position]] if layer == 0 else [],
    )
    return sluice.message("DecodeRequest", request_id=position, layer=layer, answer="ANSWER_OUTPUT", steps=[step])


def dense_attention(query, rows):
    """query [query_head][d], rows [lane][token][key and value] -> output [query_head][d], log-sum-exp [query_head]."""
    group = QUERY_HEADS // KV_HEADS
    keys, values = rows[..., :HEAD_DIM].astype(np.float64), rows[..., HEAD_DIM:].astype(np.float64)
    scores = SCALE * np.einsum("lgd,ltd->lgt", query.reshape(KV_HEADS, group, HEAD_DIM).astype(np.float64), keys)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    output = np.einsum("lgt,ltd->lgd", weights / total, values)
    return output.reshape(QUERY_HEADS, HEAD_DIM), (top + np.log(total)).reshape(QUERY_HEADS)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
