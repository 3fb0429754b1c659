"""`python -m toolchain` is the command `toolchain`. What imports everything else listens to Ctrl-C first."""

import os

from toolchain import endings

NO_ROOM = b"toolchain: ran out of memory: end other programs, or raise what `ulimit -v` or the container allows\n"
"""Where not even the sentence with what was asked can be made."""


def main() -> None:
    """The command, from its first import to its end."""
    endings.watch()
    try:
        from toolchain import native
        from toolchain.cli import last_words
        from toolchain.cli import main as command

        native.last_words(last_words(), 1)
    except KeyboardInterrupt:
        endings.say(endings.INTERRUPTED)
        endings.leave(endings.INTERRUPTED)
    except SystemExit as left:
        if left.code == endings.TERMINATED:
            endings.say(endings.TERMINATED)
            endings.leave(endings.TERMINATED)
        raise
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        _require_room(error)
        raise
    try:
        command()
    except SystemExit as left:
        if not isinstance(left.code, str):
            endings.leave(left.code or 0)
        raise
    except MemoryError as error:
        _require_room(error)


def _require_room(error: Exception) -> None:
    """Leave, in one sentence, where that is what was missing."""
    try:
        from toolchain import shortage

        short = shortage.found(error) is not None
    except (ImportError, MemoryError):
        short = True
    if short:
        os.write(2, NO_ROOM)
        os._exit(1)


if __name__ == "__main__":
    main()
