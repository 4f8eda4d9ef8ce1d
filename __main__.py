"""The program's door, also of ``python -m i2l``: Ctrl-C ends it quietly, even before it has imported itself."""

import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a script's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line takes over
    from .cli import main as cli  # noqa: PLC0415 - the imports are what takes time

    cli()


if __name__ == "__main__":
    main()
