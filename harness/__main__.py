"""Entry point: `python -m harness`, and the console script `harness`.

It imports nothing before it can say what an interrupt means: the first second of a command is spent with imports, and a
Ctrl-C then is an interrupt like any other.
"""

from __future__ import annotations

INTERRUPTED = 130
"""128 and the number of SIGINT, as a shell reports it."""


def main() -> None:
    """Runs the command line; ends the process with its exit code, or quietly with 130 when it is interrupted."""
    try:
        from harness.cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
