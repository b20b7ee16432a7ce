import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import failures, fastest_correct_peer, targets, write_report
from benchmarks.results import Row, table

OURS = Row(
    "diagonal", "resnet18", "ggn_diagonal", role="ours", step="whole", seconds=1.2,
    unit_seconds=1.0, fb=1.2, fb_low=1.1, fb_high=1.3, turns=3, memory_mib=10.0, memory=1.4,
    error=1e-6,
)  # fmt: skip
PEER = replace(OURS, contender="hooks", role="peer", fb=2.4)
WRONG = replace(PEER, contender="loop", fb=1.8, status="wrong", message="relative error 1")
RANDOM = replace(PEER, contender="probe", fb=1.5, estimate=True)
FAILED = Row("diagonal", "resnet18", "broken", status="failed", message="TypeError: no")
MASK = Row("mask", "vit_base", "make_mask", role="ours", step="whole", seconds=2.5, memory=1.0)
ROWS = [OURS, PEER, WRONG, RANDOM, FAILED, MASK]
RECORD: dict[str, Any] = {
    "processor": "a processor", "device": "x86_64", "device_type": "cpu", "memory_gib": 8.0,
    "parameters": {"threads": 2, "images": 32}, "started": "2026-01-01T00:00:00+00:00",
    "commit": None, "seconds": 600.0, "python": "3.11.9",
    "versions": {"torch": "2.11", "absent": None},
}  # fmt: skip


def test_failing_peers_are_listed_with_their_message() -> None:
    listed = failures(table([*ROWS, replace(FAILED, model="resnet50")]))
    assert list(listed) == ["task", "contender", "on", "is", "message"]
    assert listed.to_numpy().tolist() == [
        ["diagonal", "loop", "resnet18", "wrong", "`relative error 1`"],
        ["diagonal", "broken", "resnet18, resnet50", "failed", "`TypeError: no`"],
    ]


def test_only_correct_peers_are_compared_with() -> None:
    found = fastest_correct_peer(table(ROWS), "diagonal", "resnet18", "whole")
    assert found is not None
    assert found.contender == "hooks"
    assert fastest_correct_peer(table([WRONG]), "diagonal", "resnet18", "whole") is None


def test_targets_are_met_or_not_by_their_own_bounds() -> None:
    rows = targets(table(ROWS), "cpu").set_index("target")
    assert list(rows.met) == ["yes", "yes", "no", "no", "yes"]
    ratio = rows.loc["times faster than the fastest correct peer (hooks)"]
    assert (ratio["at least"], ratio.measured) == ("2.50", "2.00")


def test_the_page_has_all_its_files_from_one_folder(tmp_path: Path) -> None:
    table(ROWS).to_csv(tmp_path / "measurements.csv", index=False)
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    for name in ("work", "profile"):
        (tmp_path / f"{name}.csv").write_text("\n")
    write_report(tmp_path)
    page = Path(__file__).parents[2] / "book" / "experiments" / "benchmarks.md"
    named = set(re.findall(r"results/benchmarks/cpu/page/(\S+)", page.read_text("utf-8")))
    written = {path.name for path in (tmp_path / "page").iterdir()}
    assert {name for name in named if name.endswith(".csv")} <= written
    assert "diagonal.png" in written & named
