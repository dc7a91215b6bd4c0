"""How a step ends when it does not pass."""


class Failed(Exception):
    """What is wrong."""


class Skipped(Exception):
    """Why a step cannot run here."""


def fail_unless(condition, reason):
    if not condition:
        raise Failed(reason)
