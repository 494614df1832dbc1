"""A plan as one HTML page: a bar of the GPU's memory by part, and the terminal output."""

from __future__ import annotations

import html

from llava_moslora.devices import GIB
from llava_moslora.pages import page, table
from llava_moslora.planning.plan import Plan
from llava_moslora.planning.report import text, verdict

WIDTH, HEIGHT, ROW = 1000, 26, 22  # px of the whole bar, its height, and a part's line
STYLE = """
svg { width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
.counted { fill: var(--a); } .measured { fill: var(--b); } .assumed { fill: #8889; }
.card { fill: none; stroke: currentColor; } pre { overflow-x: auto; }
"""


def plan_page(plan: Plan, *, suggested: bool) -> str:
    """The page; nothing in it is fetched, no script runs."""
    rows = [(part.name, f"{part.size / GIB:.2f}", part.source) for part in plan.memory.parts]
    body = f"<p>{html.escape(verdict(plan))}</p>{bars(plan)}"
    body += table(rows, head=("part", "GiB", "source"))
    return page("Plan", f"{body}<pre>{html.escape(text(plan, suggested=suggested))}</pre>", STYLE)


def bars(plan: Plan) -> str:
    """An SVG: the parts one behind the other on the card's memory, then a bar for each."""
    used, scale = plan.memory, WIDTH / max(plan.request.capacity, plan.memory.high)
    parts = [(p.name, p.size, p.source.split()[0]) for p in used.parts]
    parts.append(("CUDA's context, fragmentation (at most)", used.high - used.peak, "assumed"))
    shapes, x, y = [], 0.0, HEIGHT + ROW
    for name, size, source in parts:
        width = max(size, 0) * scale
        label = f"{html.escape(name)}: {size / GIB:.2f} GiB"
        shapes.append(f'<rect class={source} x="{x:.1f}" y="0" width="{width:.1f}" height="{HEIGHT}">'
                      f"<title>{label}</title></rect>")  # fmt: skip
        shapes.append(f'<rect class={source} x="0" y="{y}" width="{width:.1f}" height="{ROW - 8}"/>')
        inside = width > WIDTH / 2  # a long bar's name stands in it
        shapes.append(f'<text x="{6 if inside else width + 6:.1f}" y="{y + ROW - 11}">{label}</text>')
        x, y = x + width, y + ROW
    shapes.append(f'<rect class=card x="0" y="0" width="{plan.request.capacity * scale:.1f}" height="{HEIGHT}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {y}" role=img aria-label="memory of one GPU">{"".join(shapes)}</svg>'
