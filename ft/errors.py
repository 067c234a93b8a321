"""The two ways a run ends because of something the user can mend."""


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
