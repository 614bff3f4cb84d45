"""The table of tiles: every question has one answer, and a wrong file says where it is wrong."""

import json
import random
from pathlib import Path

import pytest
import torch

from moe.kernels import configs
from moe.kernels.configs import Config

ARCHS = (80, 86, 89, 90, 100, 103, 120, 121)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def content():
    """The shipped file, to be spoiled."""
    return json.loads(configs.FILE.read_text())


@pytest.fixture
def load(tmp_path):
    def load(content):
        path = tmp_path / "tiles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return configs.load(path)

    return load


def one_row(**changes):
    return {"block": [64, 64, 32], "warps": 4, "stages": 3, "ctas": 1, **changes}


def with_rows(content, rows):
    content["rows"]["gmm"]["90"]["half"] = rows
    return content


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_dtype_and_load_has_a_tile_on_every_card(arch):
    for kernel in configs.KERNELS:
        for dtype in DTYPES:
            for rows_per_expert in (0.01, 1, 24, 24.5, 160, 5000, 1e9):
                found = configs.lookup(kernel, arch, dtype, random.randint(1, 9000), 64, rows_per_expert)
                assert isinstance(found, Config) and all(v > 0 for v in found)


def test_bf16_and_fp16_take_the_same_tile():
    for kernel in configs.KERNELS:
        a, b = (configs.lookup(kernel, 90, dtype, 256, 1024, 100) for dtype in DTYPES[:2])
        assert a == b


def test_a_bound_belongs_to_its_row_and_the_next_row_begins_above_it(content, load, monkeypatch):
    rows = [one_row(rows=24, width=64), one_row(rows=24, ctas=2), one_row(rows=100, ctas=3), one_row(ctas=4)]
    table = load(with_rows(content, rows))
    monkeypatch.setattr(configs, "table", lambda: table)
    cases = {(24, 64): 1, (24, 65): 2, (3, 1): 1, (24.5, 64): 3, (100, 9): 3, (100.01, 9): 4}
    for (rows_per_expert, n), ctas in cases.items():
        assert configs.lookup("gmm", 90, torch.bfloat16, n, 8, rows_per_expert).ctas == ctas


def test_a_card_that_is_not_listed_takes_the_next_lower_family():
    def of(arch):
        return configs.lookup("gmm", arch, torch.bfloat16, 1024, 256, 1000)

    assert of(87) == of(86) and of(99) == of(90) and of(110) == of(103) and of(200) == of(121) == of(120)
    with pytest.raises(ValueError, match=r"^sm_75: .*8\.0"):
        of(75)


def test_double_precision_is_refused_in_one_line():
    with pytest.raises(ValueError, match="float64") as told:
        configs.lookup("gmm", 90, torch.float64, 8, 8, 8)
    assert "\n" not in str(told.value)


def test_tiles_of_small_cards_ask_for_small_memory():
    """Families are told apart by memory: what is cut for 99 KB must not stand in their place by mistake."""
    table = configs.table()
    for (kernel, family, dtype), rows in table.rows.items():
        for row in rows:
            c, size = row.config, 4 if dtype == "fp32" else 2
            columns = c.block_n * (2 if kernel == "up_swiglu" else 1)
            least = (c.num_stages - 1) // 2 * (c.block_m + columns) * c.block_k * size
            assert least <= {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}[family] * 1024, row


@pytest.mark.parametrize(
    "rows, told",
    [
        ([], r"gmm\.90\.half has no rows"),
        ([one_row(rows=24)], r"gmm\.90\.half: the last row must hold any load"),
        ([one_row(), one_row()], r"gmm\.90\.half\[1\]: never reached"),
        ([one_row(rows=24), one_row(rows=16), one_row()], r"half\[1\]: never reached"),
        ([one_row(rows=24, width=9), one_row(rows=24, width=8), one_row()], r"half\[1\]: never reached"),
        ([one_row(block=[64, 64])], r"half\[0\]: block=\[64, 64\]"),
        ([one_row(block=[64, 48, 32])], "powers of two"),
        ([one_row(block=[64, 8, 32])], "powers of two from 16"),
        ([one_row(warps=3)], "warps=3"),
        ([one_row(warps=32)], "warps=32"),
        ([one_row(block=[512, 64, 32])], "to 256"),
        ([one_row(stages=0)], "stages=0"),
        ([one_row(ctas=99)], "ctas=99 is not a whole number from 1 to 32"),
        ([one_row(ctas=1.5)], "ctas=1.5"),
        ([one_row(ctas=True)], "ctas=True"),
        ([one_row(rows="24")], "rows='24'"),
        ([one_row(row=24)], "needs block, ctas, stages, warps"),
        ([{"block": [64, 64, 32]}], "needs block, ctas, stages, warps"),
        ([7], "needs block"),
        ({"block": 1}, r"half is not a list"),
    ],
)
def test_a_wrong_row_is_named_by_file_kernel_card_type_and_place(content, load, rows, told):
    with pytest.raises(ValueError, match=told) as error:
        load(with_rows(content, rows))
    assert "tiles.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"families": {"x": 1}, "rows": {}}',
        '{"families": 3, "rows": {}}',
        '{"families": {}, "rows": null}',
        '{"families": {"90": 90}, "rows": {"gmm": []}}',
        '{"families": {"90": 90}, "rows": {"gmm": {"9x": {"half": []}}}}',
        '{"families": {"90": 90}, "rows": {"gmm": {"90": []}}}',
        '{"families": {"90": 90}, "rows": {"gmm": 3}}',
    ],
)
def test_a_file_that_is_no_table_is_named(load, text):
    with pytest.raises(ValueError, match="tiles.json: not a table"):
        load(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: not a table"):
        configs.load(tmp_path / "nowhere.json")


def test_a_missing_list_and_a_misspelt_key_are_named(content, load):
    rows = content["rows"]["dw"]["90"].pop("fp32")
    with pytest.raises(ValueError, match=r"dw\.90\.fp32 has no rows"):
        load(content)
    content["rows"]["dw"]["90"].update(fp32=rows, fp8=rows)
    with pytest.raises(ValueError, match=r"dw\.90\.fp8 is no key"):
        load(content)


def test_the_hash_changes_with_any_number_and_not_with_the_words(content, load):
    assert load(content).hash == configs.table_hash()
    content["about"] = ["another text"]
    assert load(content).hash == configs.table_hash()
    content["rows"]["gmm"]["90"]["half"][-1]["stages"] += 1
    assert load(content).hash != configs.table_hash()


def test_a_written_table_reads_back_the_same_and_is_the_shipped_file(tmp_path, content):
    table = configs.table()
    text = configs.dump(content["about"], table)
    assert text == configs.FILE.read_text()
    (tmp_path / "again.json").write_text(text)
    assert configs.load(tmp_path / "again.json") == table


def test_the_static_report_speaks_of_this_table():
    report = (ROOT / "docs" / "kernels_static.md").read_text()
    assert configs.table_hash() in report, (
        "write it anew: python tools/compile_kernels.py --report docs/kernels_static.md"
    )
