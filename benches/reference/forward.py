#!/usr/bin/env python3
"""Logits and losses of a GGUF model in numpy: an implementation that shares nothing with the one in Rust.

    forward.py --gguf MODEL --ids IDS.json --tokens N --positions 0,5,9 --out FOLDER

writes FOLDER/logits.f32 ([position][vocabulary], little-endian) and FOLDER/losses.f64 (of token 1 to N - 1, in nats).
The whole prompt goes through each layer at once; the score matrix is written out in full and masked. Norms, rotation and softmax are
computed in f64, matrix products in f32. Rotation is always by halves, as in the models' own code: rows of Llama's q and k, which its
converter permutes for rotation by pairs, are put back first.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


class Model:
    """Metadata and tensors of a GGUF by name."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = self.fields["general.architecture"].contents()

    def get(self, key, default=None):
        field = self.fields.get(f"{self.arch}.{key}")
        return default if field is None else field.contents()

    def tensor(self, name):
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def optional(self, name):
        return self.tensor(name) if name in self.tensors else None


def rms(x, weight, epsilon):
    x = x.astype(np.float64)
    return (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight).astype(np.float32)


def rotate_halves(x, base, divisor, divisors):
    """x: [token, head, d]."""
    tokens, _, d = x.shape
    half = d // 2
    exponents = np.arange(0, d, 2, dtype=np.float64) / d
    frequencies = 1.0 / (np.float64(base) ** exponents) / divisor
    if divisors is not None:
        frequencies = frequencies / divisors.astype(np.float64)
    angles = np.arange(tokens, dtype=np.float64)[:, None] * frequencies[None, :]
    cos = np.concatenate([np.cos(angles), np.cos(angles)], axis=1)[:, None, :]
    sin = np.concatenate([np.sin(angles), np.sin(angles)], axis=1)[:, None, :]
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + turned * sin).astype(np.float32)


def put_back(weight, heads):
    """Undoes the permutation of Llama's converter: rows (pair, side) of each head become (side, pair)."""
    rows, columns = weight.shape
    d = rows // heads
    return weight.reshape(heads, d // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def attention(model, name, x, heads, kv_heads, window, base, divisor, divisors, epsilon, scale):
    tokens = x.shape[0]

    def project(part, count):
        weight = model.tensor(f"{name}.attn_{part}.weight")
        if model.arch == "llama" and part in ("q", "k"):
            weight = put_back(weight, count)
        out = x @ weight.T
        bias = model.optional(f"{name}.attn_{part}.bias")
        return (out if bias is None else out + bias).reshape(tokens, count, -1)

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    q_norm, k_norm = model.optional(f"{name}.attn_q_norm.weight"), model.optional(f"{name}.attn_k_norm.weight")
    if q_norm is not None:
        q, k = rms(q, q_norm, epsilon), rms(k, k_norm, epsilon)
    q, k = rotate_halves(q, base, divisor, divisors), rotate_halves(k, base, divisor, divisors)
    position = np.arange(tokens)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    out = np.empty_like(q)
    for head in range(heads):
        lane = head // (heads // kv_heads)
        scores = (q[:, head] @ k[:, lane].T).astype(np.float64) * scale
        scores[~seen] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[:, head] = weights.astype(np.float32) @ v[:, lane]
    return out.reshape(tokens, -1) @ model.tensor(f"{name}.attn_output.weight").T


def feed_forward(model, name, x):
    gate = (x @ model.tensor(f"{name}.ffn_gate.weight").T).astype(np.float64)
    up = x @ model.tensor(f"{name}.ffn_up.weight").T
    if model.arch == "gemma3":
        active = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        active = gate / (1 + np.exp(-gate))
    return (active * up).astype(np.float32) @ model.tensor(f"{name}.ffn_down.weight").T


def hidden_states(model, ids):
    gemma = model.arch == "gemma3"
    heads = model.get("attention.head_count")
    kv_heads = model.get("attention.head_count_kv", heads)
    epsilon = model.get("attention.layer_norm_rms_epsilon")
    base, window_base = model.get("rope.freq_base", 10000.0), model.get("rope.freq_base_swa", 10000.0)
    divisor = model.get("rope.scaling.factor", 1.0) if model.get("rope.scaling.type") == "linear" else 1.0
    divisors = model.optional("rope_freqs.weight")
    x = model.tensor("token_embd.weight")[ids]
    scale = model.get("attention.key_length", x.shape[1] // heads) ** -0.5
    if gemma:
        x = x * np.float32(np.sqrt(x.shape[1]))
    for layer in range(model.get("block_count")):
        name = f"blk.{layer}"
        slides = gemma and (layer + 1) % model.get("attention.sliding_window_pattern", 6) != 0
        window = model.get("attention.sliding_window") if slides else None
        turn = (window_base, 1.0) if slides else (base, divisor)
        part = attention(
            model, name, rms(x, model.tensor(f"{name}.attn_norm.weight"), epsilon), heads, kv_heads, window, *turn, divisors, epsilon, scale
        )
        if gemma:
            part = rms(part, model.tensor(f"{name}.post_attention_norm.weight"), epsilon)
        x = x + part
        part = feed_forward(model, name, rms(x, model.tensor(f"{name}.ffn_norm.weight"), epsilon))
        if gemma:
            part = rms(part, model.tensor(f"{name}.post_ffw_norm.weight"), epsilon)
        x = x + part
    return rms(x, model.tensor("output_norm.weight"), epsilon)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--ids", required=True, help="JSON list of token ids")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--positions", required=True, help="positions whose logits are written")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = Model(args.gguf)
    ids = np.array(json.loads(Path(args.ids).read_text())[: args.tokens])
    hidden = hidden_states(model, ids)
    head = model.optional("output.weight")
    head = model.tensor("token_embd.weight") if head is None else head
    losses = []
    for start in range(0, len(ids) - 1, 128):
        targets = ids[start + 1 : start + 129]
        logits = (hidden[start : start + len(targets)] @ head.T).astype(np.float64)
        largest = logits.max(axis=1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        losses.append(total - logits[np.arange(len(targets)), targets])
    positions = [int(position) for position in args.positions.split(",")]
    (hidden[positions] @ head.T).astype("<f4").tofile(args.out / "logits.f32")
    np.concatenate(losses).astype("<f8").tofile(args.out / "losses.f64")


if __name__ == "__main__":
    main()
