"""What runs inside the sandbox, in a fresh interpreter without our packages: the standard library alone.

`zygote` is started by `align.core.sandbox.zygotes`, isolates itself (`isolation`, `seccomp`, `landlock`), and forks
once per execution into `runner` (a solution) or `checker` (tests). `codec` is the only language the two sides speak.
"""

from __future__ import annotations


class Refused(Exception):  # noqa: N818
    """The system does not let us take a step of the isolation.

    Args:
        step: what was tried.
        code: the errno.
    """

    def __init__(self, step: str, code: int) -> None:
        super().__init__(step, code)
        self.step, self.code = step, code
