#!/usr/bin/env python3
"""Writes a tiny GGUF of one family with random weights:  tiny.py FAMILY SEED OUT.gguf

FAMILY: gemma3 (window of 24 tokens), llama (permuted q and k, stretched frequencies, own output head), qwen2 (biases), qwen3 (norms of q and k).
Some matrices are Q8_0, so that blocks are read as well. Vocabularies are small but real: bytes, and a few joined pieces.
"""
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.quants import quantize

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD = 128, 4, 2, 64, 192
LAYERS = {"gemma3": 7, "llama": 3, "qwen2": 3, "qwen3": 3}
WORDS = ["▁t", "he", "▁the", "in", "er", "▁c", "at", "▁cat", "▁▁", "ng", "ing"]


def byte_characters():
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins, extra = {}, 0
    for byte in range(256):
        stand_ins[byte] = chr(byte) if byte in kept else chr(256 + extra)
        extra += byte not in kept
    return [stand_ins[byte] for byte in range(256)]


def add_pieces(writer):
    """SentencePiece: marks, bytes, characters, words; a user-defined run of newlines."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz.,", *WORDS, "\n\n"]
    types += [TokenType.NORMAL] * (len(tokens) - len(types) - 1) + [TokenType.USER_DEFINED]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0 if kind != TokenType.NORMAL else -float(id) for id, kind in enumerate(types)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def add_bytes(writer):
    """Byte-level BPE: bytes, merged words, one control and one user-defined token."""
    tokens = byte_characters()
    merges = ["Ġ t", "h e", "Ġt he", "i n", "in g", "Ġ c", "a t", "Ġc at"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [TokenType.NORMAL] * len(tokens)
    tokens += ["<|endoftext|>", "<tool_call>"]
    types += [TokenType.CONTROL, TokenType.USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(False)
    return len(tokens)


def add_metadata(writer, family):
    writer.add_block_count(LAYERS[family])
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6 if family != "llama" else 5e5)
    if family == "gemma3":
        writer.add_sliding_window(24)


def main():
    family, seed, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, family)
    add_metadata(writer, family)
    vocabulary = add_pieces(writer) if family in ("gemma3", "llama") else add_bytes(writer)

    def matrix(name, outputs, inputs, gain=1.0, blocks=False):
        data = random.normal(0, gain / np.sqrt(inputs), (outputs, inputs)).astype(np.float32)
        if blocks:
            writer.add_tensor(name, quantize(data, Type.Q8_0), raw_dtype=Type.Q8_0)
        else:
            writer.add_tensor(name, data)

    def vector(name, length, mean, spread):
        writer.add_tensor(name, random.normal(mean, spread, length).astype(np.float32))

    matrix("token_embd.weight", vocabulary, HIDDEN, gain=4.0)
    vector("output_norm.weight", HIDDEN, 1.0, 0.2)
    if family == "llama":
        matrix("output.weight", vocabulary, HIDDEN, gain=3.0)
        writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 8.0, HEAD_DIM // 2).astype(np.float32))
    for layer in range(LAYERS[family]):
        name = f"blk.{layer}"
        vector(f"{name}.attn_norm.weight", HIDDEN, 1.0, 0.2)
        vector(f"{name}.ffn_norm.weight", HIDDEN, 1.0, 0.2)
        # A gain well above 1 makes attention pick few tokens: a wrong mask or rotation then moves every logit.
        matrix(f"{name}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN, gain=2.0, blocks=True)
        matrix(f"{name}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN, gain=2.0)
        matrix(f"{name}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"{name}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"{name}.ffn_gate.weight", FEED_FORWARD, HIDDEN, blocks=True)
        matrix(f"{name}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        matrix(f"{name}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        if family == "qwen2":
            for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                vector(f"{name}.attn_{part}.bias", heads * HEAD_DIM, 0.0, 0.5)
        if family in ("qwen3", "gemma3"):
            vector(f"{name}.attn_q_norm.weight", HEAD_DIM, 1.5, 0.3)
            vector(f"{name}.attn_k_norm.weight", HEAD_DIM, 1.5, 0.3)
        if family == "gemma3":
            vector(f"{name}.post_attention_norm.weight", HIDDEN, 1.0, 0.2)
            vector(f"{name}.post_ffw_norm.weight", HIDDEN, 1.0, 0.2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
