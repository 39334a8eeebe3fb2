"""A page as a real browser shows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OFFLINE

BROWSE = Path(__file__).with_name("browse.py")
CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3


def looks(page: Path, folder: Path) -> list[dict[str, Any]]:
    """What Chromium makes of `page` in both colour schemes, on a phone and on a desk; screenshots go to `folder`."""
    if shutil.which("chromium") is None:
        pytest.skip("needs a browser: apt-get install chromium")
    if find_spec("playwright") is None:
        pytest.skip("needs playwright: pip install 'ift_peft[dev]'")
    done = subprocess.run(
        [sys.executable, str(BROWSE), str(page), str(folder)],
        env={**os.environ, "PYTHONPATH": str(OFFLINE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check(found: list[dict[str, Any]], page: Path, *, sections: list[str]) -> None:
    """Each look is complete, quiet, readable and within its window, and the two colour schemes are two."""
    assert [(look["scheme"], look["width"]) for look in found] == [
        ("light", 360),
        ("light", 1200),
        ("dark", 360),
        ("dark", 1200),
    ]
    for look in found:
        assert look["complaints"] == []
        assert [url for url in look["requests"] if not url.startswith("data:")] == [page.resolve().as_uri()]
        assert look["sections"] == sections
        assert look["overflow"] == 0
        assert look["texts"] > 50
        assert look["worst"]["contrast"] >= CONTRAST, look["worst"]
        assert look["levels"][0] == 1
        assert all(after <= before + 1 for before, after in zip(look["levels"], look["levels"][1:], strict=False))
        assert (look["unscoped"], look["unnamed"], look["small"], look["outside"]) == (0, 0, 0, 0)
        assert Path(look["screenshot"]).stat().st_size > 10_000
    light, dark = (sum(look["background"][:3]) / 3 for look in (found[0], found[2]))
    assert light - dark > 150
