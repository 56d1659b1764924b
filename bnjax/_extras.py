"""What is missing where a part of bnjax needs more than the base: an error of one line, with the command to type."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ModuleNotFoundError):
    """A package is missing that one of bnjax's extras installs; the message says how to install it."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports within this `with` statement raise `MissingExtraError` where what the extra installs is missing.

    Args:
      extra: its name in pyproject.toml, such as 'plots'.

    >>> try:
    ...     with needs("plots"):
    ...         import a_drawing_library
    ... except MissingExtraError as error:
    ...     print(error)
    a_drawing_library is not installed: pip install 'bnjax[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingExtraError(f"{package} is not installed: pip install 'bnjax[{extra}]'", name=package) from None
