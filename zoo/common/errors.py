"""The ways in which a run ends badly, each told to the user in one line."""


class UsageError(Exception):
    """Something given cannot work; names the argument, the value and what would be right. Exit status 2."""


class RunFault(Exception):
    """The run cannot go on (a non-finite loss, a full disk); its last checkpoint stays. Exit status 1."""


class EnvironmentFault(RunFault):
    """The environment raised or returned something non-finite."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run; `signal_number` says which. Exit status 128 plus that."""

    def __init__(self, signal_number: int):
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number
