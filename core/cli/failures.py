"""What a command says when a library that it calls fails."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.errors import ScionError, one_line, printable

if TYPE_CHECKING:

    pass


def says_what_failed(command: Callable[..., int]) -> Callable[..., int]:
    """The command, with an error of the system told as bad input is: a full disk, a folder that cannot be read."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> int:
        try:
            code = command(*arguments, **options)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever reads has seen enough
            raise
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):  # what could not be printed is not tried again at the end
                sys.stdout.flush()
            name = printable(error.filename) + ": " if error.filename is not None else ""
            raise ScionError(f"{name}{error.strerror or one_line(error)}") from error

    return run
