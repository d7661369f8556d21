"""The golden file's comparison catches what got worse, by name; the table shows what there is."""

import json

import pytest

from bench import machine_code
from bench.machine_code_table import MARKERS, as_text, differences, fewer, markdown, write

FIGURES = {
    "registers": 128,
    "spilled": 0,
    "local_accesses": 0,
    "shared": 8192,
    "warps": 4,
    "blocks": 4,
    "tensor_unit": "HGMMA",
    "tensor_instructions": 30,
    "tensor_macs": 3000,
    "loads": 12,
    "wide_loads": 10,
    "unwritten": 0,
}
TWIN = FIGURES | {"tensor_instructions": 40, "tensor_macs": 4000, "registers": 255, "blocks": 1}
CASES = {
    "attention 40": {"sm_80": FIGURES, "sm_90": FIGURES, "sm_86": {"shared": 8192, "fits": True}},
    "attention 40 padded": {"sm_80": TWIN},
    "step": {"sm_80": FIGURES | {"tensor_unit": "", "tensor_instructions": 0, "tensor_macs": 0}},
}
FOUND = {"triton": {"3.8.0": CASES}}


def copied(table):
    """In which nothing is shared: FIGURES stand in several places."""
    return json.loads(json.dumps(table))


def test_equal_tables_do_not_differ():
    assert differences(CASES, copied(CASES)) == []


@pytest.mark.parametrize(
    ("figure", "value", "verdict"),
    [
        ("spilled", 8, "worse"),
        ("local_accesses", 1, "worse"),
        ("blocks", 3, "worse"),
        ("blocks", 5, "better"),
        ("tensor_instructions", 31, "worse"),
        ("tensor_instructions", 29, "better"),
        ("tensor_macs", 3001, "worse"),
        ("wide_loads", 9, "worse"),
        ("unwritten", 1, "worse"),
        ("tensor_unit", "HMMA", "worse"),
        ("registers", 129, "a change"),
        ("shared", 8193, "a change"),
    ],
)
def test_a_planted_change_is_named(figure, value, verdict):
    doctored = copied(CASES)
    doctored["attention 40"]["sm_90"][figure] = value
    (sentence,) = differences(CASES, doctored)
    old = FIGURES[figure]
    assert sentence == f"attention 40, sm_90: {figure} was {old!r}, is {value!r} ({verdict})"


def test_what_no_longer_fits_is_named():
    doctored = copied(CASES)
    doctored["attention 40"]["sm_86"]["fits"] = False
    assert differences(CASES, doctored) == ["attention 40, sm_86: fits was True, is False (worse)"]


def test_cases_that_come_and_go_are_named():
    fewer_cases = {name: CASES[name] for name in ("attention 40", "attention 40 padded")}
    assert differences(CASES, fewer_cases) == ["step, sm_80: only in the golden file"]
    assert differences(fewer_cases, CASES) == ["step, sm_80: not in the golden file"]


def test_golden_file_keeps_other_versions():
    golden = {"triton": {"3.7.0": {"old": {}}, "3.8.0": {"gone": {}}}, "nvcc": {"13.0.88": {}}}
    renewed = machine_code.renewed(golden, FOUND)
    assert renewed["triton"] == {"3.7.0": {"old": {}}, "3.8.0": CASES}
    assert renewed["nvcc"] == {"13.0.88": {}}
    assert json.loads(as_text(renewed)) == renewed
    assert max(map(len, as_text(renewed).splitlines())) < 300


def test_errors_name_what_failed():
    found = copied(FOUND) | {"nvcc": {"13.0.88": {"sm_90": {"x.cu": {"error": "spills"}}}}}
    found["triton"]["3.8.0"]["step"]["gfx942"] = {"error": "no lld"}
    assert list(machine_code.errors(FOUND)) == []
    assert list(machine_code.errors(found)) == [
        "triton, 3.8.0, step, gfx942 does not compile: no lld",
        "nvcc, 13.0.88, sm_90, x.cu does not compile: spills",
    ]


def test_saved_part_of_the_padded_form():
    assert fewer(FIGURES, TWIN, "tensor_instructions") == 0.25


def test_table_shows_padded_figures_in_brackets():
    text = markdown(FOUND)
    row = next(line for line in text.splitlines() if line.startswith("| attention 40 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "attention 40",
        "128 (255)",
        "0 (0)",
        "8 (8)",
        "30 HGMMA (40 HGMMA)",
        "-25.0%",
        "10 of 12 (10 of 12)",
        "4 x 4 (1 x 4)",
    ]
    assert "| sm_86 | 1 | 8 | 0 |" in text
    assert "| attention 40 padded" not in text


def test_page_is_written_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before {MARKERS[0]} old {MARKERS[1]} after")
    write("new", page=page)
    write("newer", page=page)
    assert page.read_text() == f"before {MARKERS[0]}\n\nnewer\n\n{MARKERS[1]} after"
    page.write_text("no marker")
    with pytest.raises(ValueError, match="no <!-- machine code -->"):
        write("new", page=page)
