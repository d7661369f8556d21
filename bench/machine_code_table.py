"""Figures of `machine_code.py` as Markdown, as a golden file, and against one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.cubin import CHIPS, KIB

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
MARKERS = ("<!-- machine code -->", "<!-- end of machine code -->")
PADDED = " padded"  # what the name of a case with a padded head dimension ends in
RENEW = "python -m bench.machine_code --write"

Figures = Mapping[str, Any]
# By case, then by target.
Cases = Mapping[str, Mapping[str, Figures]]

# Whether more of it is worse (1), or less (-1). Of the rest any change is worth a look.
_WORSE = {
    "spilled": 1,
    "local_accesses": 1,
    "tensor_instructions": 1,
    "tensor_macs": 1,
    "blocks": -1,
    "wide_loads": -1,
    "unwritten": 1,
    "fits": -1,
}


def differences(old: Cases, new: Cases) -> list[str]:
    """Sentences: what is not as the golden file has it, and whether that is worse."""
    return [*_differences(old, new)]


def _differences(old: Cases, new: Cases) -> Iterator[str]:
    for case in sorted({*old, *new}):
        for target in sorted({*old.get(case, {}), *new.get(case, {})}):
            was, now = (side.get(case, {}).get(target) for side in (old, new))
            if was is None or now is None:
                where = "only in the golden file" if now is None else "not in the golden file"
                yield f"{case}, {target}: {where}"
                continue
            for figure in sorted({*was, *now}):
                if was.get(figure) != now.get(figure):
                    verdict = _verdict(figure, was.get(figure), now.get(figure))
                    change = f"was {was.get(figure)!r}, is {now.get(figure)!r}"
                    yield f"{case}, {target}: {figure} {change} ({verdict})"


def _verdict(figure: str, old: Any, new: Any) -> str:
    if figure == "tensor_unit":
        return "better" if new == "HGMMA" else "worse"
    if figure not in _WORSE or old is None or new is None:
        return "a change"
    return "worse" if (new - old) * _WORSE[figure] > 0 else "better"


def fewer(shipped: Figures, padded: Figures, figure: str) -> float:
    """The part of the padded form's instructions that is saved."""
    return 1 - shipped[figure] / padded[figure]


def markdown(found: Mapping[str, Any]) -> str:
    """What goes into docs/kernels.md."""
    ((version, cases),) = found["triton"].items()
    parts = [
        f"**{target}**, Triton {version}\n\n{_table(cases, target)}"
        for target in ("sm_80", "sm_90")
    ]
    parts.append(_compiles(cases))
    for nvcc_version, kernels in found.get("nvcc", {}).items():
        parts.append(_cu_table(nvcc_version, kernels))
    return "\n\n".join(parts)


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(cases: Cases, target: str) -> str:
    header = ["kernel", "registers", "spilled", "shared KiB", "tensor-core instructions", "work"]
    header += ["128-bit of all loads", "blocks x warps an SM"]
    rows = []
    for name, targets in cases.items():
        if name.endswith(PADDED) or target not in targets:
            continue
        own, other = targets[target], cases.get(name + PADDED, {}).get(target)

        def cell(write: Any, own: Figures = own, other: Figures | None = other) -> str:
            return write(own) + (f" ({write(other)})" if other else "")

        work = f"-{fewer(own, other, 'tensor_macs'):.1%}" if other else ""
        row = [name, cell(lambda it: f"{it['registers']}"), cell(lambda it: f"{it['spilled']}")]
        row += [cell(lambda it: f"{it['shared'] / KIB:.3g}"), cell(_tensor), work]
        row += [cell(lambda it: f"{it['wide_loads']} of {it['loads']}")]
        row += [cell(lambda it: f"{it['blocks']} x {it['warps']}")]
        rows.append(row)
    return _rows(header, rows)


def _tensor(figures: Figures) -> str:
    count = figures["tensor_instructions"]
    return f"{count} {figures['tensor_unit']}" if count else "none"


def _compiles(cases: Cases) -> str:
    """One row a target of which only that it compiles is of interest."""
    rows = []
    for target in (*(f"sm_{capability}" for capability in CHIPS), "gfx942"):
        there = [targets[target] for targets in cases.values() if target in targets]
        if not there or "fits" not in there[0]:
            continue
        most = max(figures["shared"] for figures in there)
        too_big = sum(not figures["fits"] for figures in there)
        rows.append([target, f"{len(there)}", f"{most / KIB:.3g}", f"{too_big}"])
    header = ["also compiled for", "kernels", "most shared KiB", "that ask for more than it has"]
    return _rows(header, rows)


def _cu_table(version: str, kernels: Mapping[str, Cases]) -> str:
    targets = [target for target, found in kernels.items() if any(found.values())]
    others = ", ".join(target for target in kernels if target not in targets)
    header = [f"nvcc {version}"]
    for target in targets:
        header += [f"{target} registers", "spilled", "128-bit of all loads"]
    rows = []
    for name in kernels[targets[0]]:
        row = [f"`{name}`"]
        for target in targets:
            it: Figures = kernels[target][name]
            row += [
                f"{it['registers']}",
                f"{it['spilled']}",
                f"{it['wide_loads']} of {it['loads']}",
            ]
        rows.append(row)
    return _rows(header, rows) + f"\n\nCompiled without a warning for {others} too."


def write(text: str, markers: tuple[str, str] = MARKERS, page: Path = PAGE) -> None:
    """Between two comments of a page, which have to be there."""
    before, start, rest = page.read_text().partition(markers[0])
    _, stop, after = rest.partition(markers[1])
    if not (start and stop):
        raise ValueError(f"{page} has no {markers[0]} ... {markers[1]} to write between")
    page.write_text(f"{before}{start}\n\n{text}\n\n{stop}{after}")


def as_text(golden: Any, indent: int = 0) -> str:
    """JSON with one line for the figures of a kernel on a target: diffs are read by people."""
    inner = golden.values() if isinstance(golden, dict) else ()
    if not any(isinstance(value, dict) for value in inner):
        return json.dumps(golden)
    space = " " * (indent + 1)
    lines = [f"{space}{json.dumps(key)}: {as_text(golden[key], indent + 1)}" for key in golden]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
