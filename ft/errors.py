"""The ways a run ends before its end: two that the user can mend, and one that was asked for."""


class FtError(Exception):
    """A failure with a message meant for the user: what happened, the value, the limit and the remedy.

    The command line prints the message without a traceback and exits with 1. Every other exception is a defect of
    this program and keeps its traceback.
    """


class UsageError(FtError):
    """The command line or a configuration is wrong; exits with 2, before any work was done.

    `problems` holds one sentence each, so that all of them are reported at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Stopped(Exception):  # noqa: N818, as nothing is wrong
    """A signal has ended the run, after it was saved; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)
