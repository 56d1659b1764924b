"""The one-line error for a missing package of one of bnjax's extras, with the command that installs it."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ModuleNotFoundError):
    """The error for a missing package that one of bnjax's extras installs; the message says how to install it."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns failed imports within a `with` statement into `MissingExtraError`, which names the extra to install.

    Args:
      extra: name of the extra in pyproject.toml, such as 'plots'.

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
