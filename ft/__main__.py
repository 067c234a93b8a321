"""The entry point of `ft` and `python -m ft`; `python run.py` does the same without an installation."""

import sys

from ft.train.signals import interrupts_on_signals, report_interrupt


def main() -> int:
    """Run the command line; a signal that comes while it is imported ends the process with a message too."""
    try:
        with interrupts_on_signals():
            from ft.cli.main import main as run  # after the signal handlers are installed: importing takes 0.3 s

            return run(sys.argv[1:])
    except KeyboardInterrupt as interrupt:
        return report_interrupt(interrupt)


if __name__ == "__main__":
    sys.exit(main())
