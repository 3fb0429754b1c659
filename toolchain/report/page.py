"""The page: its style, its tables, and the pictures it holds. All text that comes in is escaped here, but for what is said to be HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape

from toolchain.report.pictures import COLOURS, Picture

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f23;--soft:#57606a;--page:#fff;--line:#d8dee4;--tint:#f3f5f7;--good:#00674a;--bad:#a83a00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#a3adb8;--page:#14171a;--line:#343a40;--tint:#1e2327;--good:#5fd3ac;--bad:#ff9a5c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.5rem clamp(1rem,4vw,2.5rem) 4rem;background:var(--page);color:var(--ink);font:1.0625rem/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:clamp(1.5rem,5vw,2.3rem);line-height:1.2;margin:.5rem 0}
h2{font-size:1.45rem;margin:3rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1.1rem;margin:1.75rem 0 .5rem}
p,dd{max-width:46rem}
.lead{font-size:1.2rem;margin:.5rem 0}
.soft,figcaption{color:var(--soft)}
.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
.about{font-size:.95rem;margin:1.2rem 0 .2rem}
.scroll{overflow-x:auto;margin:0 0 1rem}
table{border-collapse:collapse;font-size:1rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.45rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;padding-left:.3rem}
thead th{border-bottom:2px solid var(--ink);vertical-align:bottom}
th{font-weight:600}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.5em;box-shadow:0 0 0 1px var(--soft)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.5rem;align-items:start;margin:1rem 0}
figure{margin:0;max-width:36rem}
img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:.5rem;padding:.4rem}
figcaption{font-size:.92rem;padding:.35rem .2rem}
code{font-family:ui-monospace,monospace;font-size:.9em;background:var(--tint);border-radius:.25rem;padding:.1em .3em}
.lead code{white-space:nowrap}
pre{background:var(--tint);border-radius:.4rem;padding:.8rem;white-space:pre-wrap}
dt{font-weight:600;margin-top:.7rem}
dd{margin:0}
@media print{figure,tr{break-inside:avoid}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for this page: nothing from anywhere."""


class Page:
    """A report under construction: `targets` in the order of the rows, and the pictures drawn so far by file name without ending."""

    def __init__(self, targets: tuple[str, ...]) -> None:
        self.targets = targets
        self.palette = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(targets)}
        self.drawn: dict[str, Picture] = {}

    def document(self, title: str, parts: Iterable[str]) -> str:
        """The whole page; `parts` are HTML."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in parts if part)
            + "\n</body>\n</html>\n"
        )

    def panels(self, pictures: Iterable[Picture]) -> str:
        """Pictures side by side, as many as fit; each is kept under a file name of its own."""
        return '<div class="panels">\n' + "\n".join(self._figure(picture) for picture in pictures) + "\n</div>"

    def target(self, name: str) -> str:
        """HTML of a target's name with its colour."""
        return f'<span class="dot" style="background:{self.palette[name]}"></span>{escape(name)}'

    def _figure(self, picture: Picture) -> str:
        name = _free(picture.name, self.drawn)
        self.drawn[name] = picture
        data = base64.b64encode(picture.png).decode()
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
            f"<figcaption>{escape(picture.caption)} <code>{name}</code></figcaption></figure>"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table that scrolls by itself on a narrow screen. `caption` is text, `head` and `rows` are HTML; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return (
        f'<p class="soft about">{escape(caption)}</p>\n<div class="scroll" tabindex="0"><table aria-label="{escape(caption)}">\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _free(wanted: str, taken: Iterable[str]) -> str:
    """A file name like `wanted`, of plain characters, that no picture has yet."""
    name = re.sub(r"[^a-z0-9._-]+", "-", wanted.lower()).strip("-.") or "picture"
    known, count = set(taken), 2
    if name not in known:
        return name
    while f"{name}-{count}" in known:
        count += 1
    return f"{name}-{count}"
