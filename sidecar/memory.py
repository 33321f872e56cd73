"""What a process that holds keys must not leave behind (docs/adr/0010)."""

import resource


def no_core_dumps() -> None:
    """For the life of this process, and not to be undone: a core dump would hold keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
