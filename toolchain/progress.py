"""What a person at a terminal sees: progress bars on stderr, only where that is a terminal, and text that cannot steer it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

STEERING = [
    *(n for n in range(0x20) if chr(n) not in "\n\t"),
    *range(0x7F, 0xA0),
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
]
"""Characters that move the cursor, colour, ring or turn the direction of text: control characters, Unicode's marks of lines and directions, and the bytes of a file's name that are no text."""

SHOWN = {n: f"\\u{n:04x}" for n in STEERING}


def visible(text: str) -> str:
    """`text` with every character that would steer a terminal written as \\u001b: names come out of files. In JSON that is the same text."""
    return text.translate(SHOWN)


def track(items: Iterable[T], label: str, total: int | None = None, weight: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """`items`, with a bar called `label` while they are consumed; an item is `weight` of `total`."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(escape(visible(label)), total=len(items) if total is None and isinstance(items, Sized) else total)
        for item in items:
            yield item
            progress.advance(bar, weight(item))


def say(message: str) -> None:
    """One line for the person at the terminal, on stderr; where nobody listens any more, or the log's disk is full, the work goes on."""
    with contextlib.suppress(OSError):
        print(visible(message), file=sys.stderr, flush=True)
