"""One step of decoding by the native kernels (decode.cpp): mirrors of its structs; moe/inference/native.py fills them.

B sequences, T new tokens each, N = B * T rows
"""

from __future__ import annotations

from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

from moe.kernels.native.library import Struct, call


class DecodeLayer(Struct):
    _fields_ = [
        *((name, c_void_p) for name in ("attn_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o")),
        *((name, c_void_p) for name in ("ffn_norm", "up", "down")),
        ("g", c_int64),
        *((name, c_void_p) for name in ("router", "w13", "w2", "bias", "latents", "chosen")),
    ]


class Decode(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("b", "t", "layers", "capacity", "d", "h", "q", "c", "nope", "rope", "v")),
        *((name, c_int64) for name in ("e", "k", "f", "groups", "kept", "vocab")),
        *((name, c_int32) for name in ("dtype", "threads", "sigmoid", "norm")),
        *((name, c_float) for name in ("eps", "scale", "scaling")),
        ("layer", POINTER(DecodeLayer)),
        *((name, c_void_p) for name in ("tokens", "lengths", "cos", "sin", "embed", "last_norm", "head")),
        *((name, c_void_p) for name in ("hidden", "logits")),
        ("temperature", c_float),
        ("keys", c_void_p),
        ("number", c_int64),
        *((name, c_void_p) for name in ("drawn", "logprob")),
    ]


def decode_step(step: Decode) -> None:
    """Run it: the cache's rows of the new tokens, and all results, are written where `step` points."""
    call("decode_step", step)
