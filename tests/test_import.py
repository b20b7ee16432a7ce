"""What importing the package costs, beyond torch and in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pai_utils

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["timm", "torchvision", "sklearn", "scipy", "matplotlib", "pandas", "seaborn", "skimage"]


def test_importing_is_quick_and_loads_no_heavy_library() -> None:
    code = (
        "import json, sys, time, torch; before = set(sys.modules); start = time.process_time(); "
        "import pai_utils; seconds = time.process_time() - start; "
        "loaded = sorted({m.partition('.')[0] for m in set(sys.modules) - before}); "
        "print(json.dumps([seconds, loaded]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True
    ).stdout
    seconds, loaded = json.loads(output)
    assert seconds <= 0.5
    assert "pai_utils" in loaded
    assert not set(HEAVY) & set(loaded)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="pai_utils attribute scoer"):
        pai_utils.scoer  # type: ignore[attr-defined]  # noqa: B018
