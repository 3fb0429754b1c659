"""`python -m toolchain` is the command `toolchain`. What imports everything else listens to Ctrl-C first."""

from toolchain import endings


def main() -> None:
    """The command, from its first import to its end."""
    endings.watch()
    try:
        from toolchain.cli import main as command
    except KeyboardInterrupt:
        endings.say(endings.INTERRUPTED)
        endings.leave(endings.INTERRUPTED)
    except SystemExit as left:
        if left.code == endings.TERMINATED:
            endings.say(endings.TERMINATED)
            endings.leave(endings.TERMINATED)
        raise
    try:
        command()
    except SystemExit as left:
        if not isinstance(left.code, str):
            endings.leave(left.code or 0)
        raise


if __name__ == "__main__":
    main()
