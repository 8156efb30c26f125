"""HTML page of a report: one self-contained file without network access.

The Content-Security-Policy of the page allows two scripts, by hash: the page's own script and plotly. The data is
escaped JSON and shown as text, so that the browser never executes it or parses it as HTML.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import math
import time
from importlib import resources
from typing import Any

import restomod
from restomod.utils.errors import UserError


def footer() -> str:
    """Return the version and the time of a report as text."""
    return f"restomod {restomod.__version__}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"


def json_safe(value: Any) -> Any:
    """Convert a value to JSON values; numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(part) for key, part in value.items()}
    return [json_safe(part) for part in value] if isinstance(value, list | tuple) else value


def as_json(value: Any) -> str:
    """Return JSON that is safe in a script element: ASCII without <, > and &."""
    text = json.dumps(json_safe(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_page(data: dict[str, Any]) -> str:
    """Build the page of a report.

    Args:
        data: ``title``, ``footer`` and ``runs`` (see `restomod.analysis.report.data.run_data`). A live page also needs
            ``live``, ``seconds`` (between requests) and ``version``, and ``waiting`` (a reason) while there is no run.

    Raises:
        UserError: plotly is missing.
    """
    parts = {
        "POLICY": policy(bool(data.get("live"))),
        "TITLE": html.escape(str(data["title"])),
        "STYLE": _part("page.css"),
        "DATA": as_json(data),
        "PLOTLY": _plotly()[1],
        "SCRIPT": _script(),
    }
    pieces = _part("page.html").split("@")  # only the template is split, so the data may contain an @
    return "".join(parts.get(piece, piece) for piece in pieces)


@functools.cache
def policy(live: bool) -> str:
    """Return the Content-Security-Policy of a page: its two scripts and inline styles only.

    Args:
        live: whether the page may also connect to its own server.

    Raises:
        UserError: plotly is missing.
    """
    own = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src '{_hash(_script())}' '{_hash(_plotly()[0])}'; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {own}; base-uri 'none'; form-action 'none'"
    )


def _script() -> str:
    return f"{_part('charts.js')}\n{_part('page.js')}"


def _hash(script: str) -> str:
    """Return the hash of a script for a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@functools.cache
def _part(name: str) -> str:
    return resources.files("restomod.analysis.report").joinpath("page", name).read_text(encoding="utf-8").strip()


@functools.cache
def _plotly() -> tuple[str, str]:
    """Return plotly.js as text, and gzipped in base64."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise UserError(f"reports need plotly ({e}): pip install plotly") from None
    script = get_plotlyjs()
    return script, base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()
