"""Opening a page in a real browser without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
MEASURE = "<script>document.body.dataset.width = document.scrollingElement.scrollWidth</script>"


def opened(html: str, folder: Path, width: int = 1000) -> tuple[int, list[str]]:
    """How wide a page is in a window of `width` pixels, and what the browser's console says of it."""
    page = folder / "opened.html"
    page.write_text(html.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    options = [f"--user-data-dir={folder / 'browser'}", f"--window-size={width},1000", "--enable-logging=stderr"]
    done = subprocess.run(
        [str(BROWSER), *QUIET.split(), *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (wide,) = re.findall(r'<body data-width="(\d+)"', done.stdout)
    return int(wide), re.findall(r":CONSOLE[^\n]*", done.stderr)
