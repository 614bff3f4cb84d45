"""What MFU is a fraction of: GPUs are found by name, anything else is measured and the thread count is left alone."""

import pytest
import torch

from moe.analysis.ceiling import known_peak, measure_ceiling, peak_flops


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),  # not the A100
        ("NVIDIA L4", 121e12, 30.3e12),  # not the L40S
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
        ("Radeon of tomorrow", None, None),
    ],
)
def test_a_gpu_is_found_by_its_name(name, bf16, fp32):
    assert known_peak(name, torch.bfloat16) == bf16
    assert known_peak(name, torch.float32) == fp32
    assert known_peak(name, torch.float64) is None


def test_a_cpu_is_measured_and_threads_are_restored():
    before = torch.get_num_threads()
    rate = measure_ceiling(torch.float32, threads=before + 1, seconds=0.02)
    assert 1e8 < rate < 1e15
    assert torch.get_num_threads() == before
    peak = peak_flops("cpu", torch.float32)
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e15


def test_a_known_gpu_answers_from_its_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda", torch.bfloat16) == (989e12, "data sheet")
    monkeypatch.setattr("moe.analysis.ceiling.measure_ceiling", lambda *args: 1.0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32: no data-sheet figure for it
    assert peak_flops("cuda", torch.float32) == (1.0, "measured")
