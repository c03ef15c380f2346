"""What becomes of every ordered pair of formats: the table of docs/conversion.md, worked out from plans.

    python -m tests.checkpoint.matrix --write       writes it anew

A cell says what a BF16, an FP32 and an FP8 checkpoint with multi-token prediction, and moments with and without FP32
masters, keep, and where.
`exact`: all of it is in the target's own files. `X beside`: X is in the folder of carried tensors, from where every
format takes it back. `refused`: nothing is written until the user says what shall become of optimizer state.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.convert import FORMATS, Options, Plan, make_plan, open_checkpoint, run
from megatron_ext.config.errors import CheckpointError
from tests.checkpoint import tiny
from tests.checkpoint.test_selection import trained

DOCUMENT = Path(__file__).parents[2] / "docs" / "conversion.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
CUT: dict[str, dict[str, Any]] = {"deepseek": {"mp": 2}, "megatron-legacy": {"tp": 2, "ep": 2}}
"""Parallel layouts in which a format is tried, beside a single rank."""
KINDS = ("bf16", "fp32", "fp8")
STATES = {"fp32": "masters", "exp_avg": "moments", "exp_avg_sq": "moments", "ema": "averages"}


def options(format: str) -> Options:
    return Options(**CUT.get(format, {}))


def keeps(plan: Plan) -> str:
    """What a plan makes of its source, in the words of the table."""
    reasons = dict.fromkeys("scales" if "scales" in reason else "MTP" if "multi-token" in reason else "BF16 weights" if
                            "masters" in reason else reason for reason in plan.carried.values())
    return "exact" if not reasons else f"{' and '.join(reasons)} beside"


def sources(folder: Path, first: Path) -> Iterator[tuple[str, Path]]:
    """A checkpoint in every format."""
    yield "hf", first
    for format in FORMATS:
        if format.name != "hf":
            plan = make_plan(open_checkpoint(first), format, options(format.name), optimizer="carry")
            run(plan, folder / format.name)
            yield format.name, folder / format.name


def table(folder: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(from, to) -> what is kept of a BF16, an FP32 and an FP8 checkpoint, of moments, and of moments with masters."""
    cells: dict[tuple[str, str], tuple[str, ...]] = {}
    made = {dtype: tiny.make(folder / dtype / "hf", dtype, mtp=1, layers=3, wide=dtype == "fp8") for dtype in KINDS}
    made["moments"] = trained(folder / "moments" / "hf", "exp_avg", "exp_avg_sq")[0]
    made["masters"] = trained(folder / "masters" / "hf", "exp_avg", "exp_avg_sq", "fp32")[0]
    for kind, first in made.items():
        for name, source in sources(folder / kind, first):
            opened = open_checkpoint(source)
            for format in FORMATS:
                try:
                    kept = keeps(make_plan(opened, format, options(format.name)))
                except CheckpointError as error:
                    assert kind in ("moments", "masters") and "no place" in str(error), str(error)
                    held = str(error).partition("(")[2].partition(")")[0].split(", ")
                    kept = f"refused: no place for {' and '.join(dict.fromkeys(STATES[state] for state in held))}"
                cells[name, format.name] = (*cells.get((name, format.name), ()), kept)
    return cells


def markdown(cells: dict[tuple[str, str], tuple[str, ...]]) -> str:
    """Two tables as the document has them: of weights, where FP8 is named if it is something else; of state."""
    names = [format.name for format in FORMATS]
    head = ["| from \\ to | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    weights, states = ["Weights:", "", *head], ["Moments and step, and these with FP32 masters:", "", *head]
    for source in names:
        rows: tuple[list[str], list[str]] = ([], [])
        for target in names:
            bf16, fp32, fp8, moments, masters = cells[source, target]
            assert bf16 == fp32, (source, target)
            rows[0].append(bf16 + f"; FP8: {fp8}" * (fp8 != bf16))
            rows[1].append(moments + f"; with masters: {masters}" * (masters != moments))
        weights.append(f"| `{source}` | " + " | ".join(rows[0]) + " |")
        states.append(f"| `{source}` | " + " | ".join(rows[1]) + " |")
    return "\n".join([*weights, "", *states])


def published() -> str:
    """The table of the document."""
    text = DOCUMENT.read_text()
    return text[text.index(BEGIN) + len(BEGIN):text.index(END)].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    with tempfile.TemporaryDirectory() as folder:
        found = markdown(table(Path(folder)))
    if parser.parse_args().write:
        text = DOCUMENT.read_text()
        DOCUMENT.write_text(text[:text.index(BEGIN) + len(BEGIN)] + f"\n{found}\n" + text[text.index(END):])
    sys.stdout.write(found + "\n")


if __name__ == "__main__":
    main()
