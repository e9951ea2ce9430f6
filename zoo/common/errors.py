"""The ways in which a run ends badly, each told to the user in one line."""


class UsageError(Exception):
    """Something the user gave cannot work; names the argument, the value and what would be right. Exit status 2."""


class RunFault(Exception):
    """The run cannot go on (a non-finite loss, a full disk); the last good checkpoint stays. Exit status 1."""


class EnvironmentFault(RunFault):
    """The environment raised or returned something non-finite."""
