"""Draw docs/img/architecture.svg: the packages in layers. Run it by `python docs/_architecture.py` after a change.

`tests/test_docs.py` checks that the picture is what this file draws and that each package exists.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

# From top to bottom: (title of the layer, [(package, what it does), ...]). A package imports only from lower layers.
LAYERS: list[tuple[str, list[tuple[str, str]]]] = [
    ("command line", [("engine/cli", "one file a command; typer and rich are imported here alone")]),
    (
        "use cases",
        [
            ("engine/requests", "the deletion queue"),
            ("engine/pool", "references for all requests, certificates"),
            ("engine/jobs", "unlearn, train, evaluate, verify"),
        ],
    ),
    (
        "output",
        [("engine/report", "report.html and the proof page"), ("engine/audit", "record.json and its signature")],
    ),
    (
        "extras",
        [
            ("engine/attack", "U-LiRA"),
            ("engine/plan", "memory, steps, time"),
            ("engine/tuning", "search of options"),
        ],
    ),
    ("run, evaluate", [("engine/evaluate", "measures and the verdict"), ("engine/run", "loop, run folder, resume")]),
    ("methods", [("engine/methods", "one unlearning method a file"), ("engine/forget_sets", "hard forget sets")]),
    ("contract", [("engine/core", "Phase, Method, UnlearnResult, registry")]),
    ("models, data", [("engine/models", "checkpoints, attention, preprocessing"), ("engine/data", "samples, loading")]),
    ("machine", [("engine/runtime", "devices, process group, files, locks")]),
    ("kernels", [("kernels", "rollout, masks, InfoNCE; imports torch and triton alone")]),
]
TARGET = Path(__file__).parent / "img" / "architecture.svg"
_WIDTH, _ROW, _BOX, _LEFT, _GAP = 760, 58, 46, 120, 10


def draw() -> str:
    """Return the picture as SVG text."""
    height = _ROW * len(LAYERS) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif">',
        "<title>The packages in layers; each imports only from the layers below it</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="7" markerWidth="8" markerHeight="8">'
        '<path d="M0 0h8L4 8z" fill="#555"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<path d="M10 12V{height - 14}" stroke="#555" stroke-width="1.5" marker-end="url(#tip)"/>',
    ]
    for number, (title, boxes) in enumerate(LAYERS):
        top = 8 + _ROW * number
        width = (_WIDTH - _LEFT - 8 - _GAP * (len(boxes) - 1)) / len(boxes)
        parts.append(f'<text x="22" y="{top + 27}" font-size="11" fill="#555">{escape(title)}</text>')
        for place, (name, what) in enumerate(boxes):
            left = _LEFT + place * (width + _GAP)
            middle = left + width / 2
            parts += [
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BOX}" rx="4" fill="#e0f2f1" '
                'stroke="#00796b"/>',
                f'<text x="{middle:.1f}" y="{top + 19}" font-size="13" font-weight="600" text-anchor="middle" '
                f'fill="#004d40">{escape(name)}</text>',
                f'<text x="{middle:.1f}" y="{top + 36}" font-size="11" text-anchor="middle" fill="#333">'
                f"{escape(what)}</text>",
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
