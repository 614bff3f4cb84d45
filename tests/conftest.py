"""What every test shares: a fresh seed that a failure prints, one thread, uninitialised memory that is never zero."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # before anybody imports Triton: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def seed():
    """Different in every run; MOE_TEST_SEED repeats one."""
    value = int(os.environ.get("MOE_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"MOE_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty holds NaN and huge integers, so a result that was never written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def agree():
    """agree(actual, expected): largest error against the largest expected value, tight for the dtype of `actual`.

    `scale` stands for that size where few values may cancel to almost nothing.
    """

    def check(actual, expected, tolerance=None, what="", scale=0.0):
        assert actual.shape == expected.shape, f"{what} {tuple(actual.shape)} is not {tuple(expected.shape)}"
        if not actual.numel():
            return
        tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
        a, e = actual.detach().double(), expected.detach().double()
        error, size = (a - e).abs().max().item(), max(e.abs().max().item(), scale, 1e-6)
        assert error <= tolerance * size, f"{what} off by {error:.3g} of {size:.3g} (NaN: never written?)"

    return check


@pytest.fixture
def ops_path(monkeypatch):
    """ops_path("reference") answers every op of this test by that path, whatever the environment says."""
    return lambda path: monkeypatch.setenv("MOE_OPS", path)


@pytest.fixture
def small():
    """small(**changes): a whole DeepSeek-V3 (groups, shared expert, dense first layer, MTP) of a few weights."""
    from moe.config import ModelConfig

    def make(**changes):
        shape = dict(
            name="small-test", vocab_size=37, hidden_size=24, num_hidden_layers=3, first_k_dense_replace=1,
            intermediate_size=20, num_attention_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6,
            qk_rope_head_dim=4, v_head_dim=5, max_position_embeddings=512, n_routed_experts=8, n_shared_experts=1,
            num_experts_per_tok=3, moe_intermediate_size=7, n_group=4, topk_group=2, num_nextn_predict_layers=1,
            seq_aux_alpha=0.01, initializer_range=0.2, bias_update_speed=0.001, mtp_weight=0.3,
        )  # fmt: skip
        return ModelConfig(**{**shape, **changes})

    return make
