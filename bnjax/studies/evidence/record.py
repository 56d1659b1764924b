"""The one reader of `results.json`: it checks every field, and says of a file that it can't read which one is wrong."""

import os
import stat
from pathlib import Path
from typing import Annotated, Any

from bnjax._extras import needs

with needs("studies"):
    import msgspec
    from msgspec import Meta, Struct, field

SCHEMA = 3
_LARGEST = 2**26  # bytes: a hundred times the largest record of a study

Count = Annotated[int, Meta(ge=0, le=2**53)]
Plain = None | bool | int | float | str
Setting = Plain | list[Plain | list[Plain]] | dict[str, Plain | list[Plain] | dict[str, Plain]]
PictureName = Annotated[str, Meta(pattern=r"^\w[\w .-]*\.png\Z", max_length=200)]
"""The name of a figure, which is a file beside the record and can't lead to another place."""


class RecordError(ValueError):
    """A record that can't be read; the message names the file, the field and what is wrong, on one line."""

    def __init__(self, message: str):
        super().__init__(plain(message))


def plain(text: str) -> str:
    """Returns a text on one line, with escapes for what would move a terminal's cursor, or is no letter at all."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class _Version(Struct):
    schema: Any = None


class Machine(Struct, omit_defaults=True):
    """Where the numbers were measured."""

    system: str
    python: str
    backend: str
    devices: Annotated[list[str], Meta(min_length=1)]
    processor: str | None = None
    cores: Count | None = None


class Metric(Struct):
    """Values over seeds, null where a seed has none, with their mean and half of its 95 % interval."""

    values: list[float | None]
    mean: float | None
    ci95: float | None
    n: Count


class Variant(Struct):
    """One network: its settings, the shapes of its parameters by collection and path, and what was measured."""

    label: str
    metrics: dict[str, Metric]
    settings: dict[str, Setting] = {}
    parameters: dict[str, dict[str, Annotated[list[Count], Meta(max_length=32)]]] = {}


class Condition(Struct):
    """What decided a claim."""

    label: str
    metric: str
    variant: str
    minus: str | None
    control: str | None
    control_minus: str | None
    low: float | None
    high: float | None
    kind: str
    mean: float | None
    ci95: float | None
    interval: list[float | None]
    n: Count
    effect: float | None
    p_for: float | None
    p_against: float | None
    met: bool | None
    test_set: float | None
    possible: list[float | None]
    published_effect: float | None
    is_difference: bool
    digits: int | str


class Claim(Struct):
    """A claim and its verdict at the time of the run."""

    id: str
    source: str
    statement: str
    published: str
    rule: str
    control: str
    margin: str
    why: str
    family: str
    measured: str
    verdict: str
    p: float | None
    p_corrected: float | None
    amended: str = ""
    changed: str = ""
    was: str = ""
    is_arithmetic: bool = False
    needs: dict[str, str] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)


class Record(Struct):
    """The content of `results.json`, which docs/studies.md describes."""

    schema: int
    study: str
    command: str
    options: dict[str, Plain | list[Plain]]
    settings: dict[str, Setting]
    seeds: Annotated[list[Annotated[int, Meta(ge=0, lt=2**32)]], Meta(min_length=1)]
    seconds: Annotated[float, Meta(ge=0)]
    started: str
    versions: dict[str, str]
    machine: Machine
    variants: dict[str, Variant]
    claims: list[Claim]
    examples: dict[str, Count] = field(default_factory=dict)
    figures: dict[PictureName, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> dict[str, Any]:
    """Reads a record, checked.

    Raises:
      FileNotFoundError: where there is no such file.
      RecordError: for anything else that it can't use.
    """
    try:
        content = regular_file(path, _LARGEST)
        version = msgspec.json.decode(content, type=_Version).schema
        if isinstance(version, int) and version > SCHEMA:
            raise RecordError(f"{path}: schema {version} is newer than this version reads, {SCHEMA}; upgrade bnjax.")
        if version != SCHEMA:
            raise RecordError(
                f"{path}: schema must be {SCHEMA}, got {version!r:.40}; it is no record that bnjax reads."
            )
        record = msgspec.json.decode(content, type=Record)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path} can't be read ({error.strerror or error}).") from error
    except RecursionError:
        raise RecordError(f"{path}: its values are nested too deeply.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        problem, _, place = str(error).partition(" - at ")
        field = place.removeprefix("`key` in ").strip("`$.") or "the file"
        problem = problem if problem.startswith("JSON") else problem[:1].lower() + problem[1:]
        raise RecordError(f"{path}: {field}: {problem}.") from None
    if record.options.get("seeds") != len(record.seeds):
        raise RecordError(f"{path}: options.seeds must be the number of seeds, {len(record.seeds)}.")
    for name, variant in record.variants.items():
        for metric, of in variant.metrics.items():
            if len(of.values) != len(record.seeds):
                where = f"variants.{name}.metrics.{metric}.values"
                raise RecordError(f"{path}: {where} must be one for each of {len(record.seeds)} seeds.")
    return msgspec.to_builtins(record)


def write(document: Any) -> bytes:
    """Writes JSON, with null for a number that is not finite."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def regular_file(path: Path, largest: int) -> bytes:
    """Reads a file, unless it is too large or something else than a file, such as a pipe, which would never end.

    Raises:
      OSError: where it can't be read.
      RecordError: where it should not be.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise RecordError(f"{path} is no regular file.")
        if about.st_size > largest:
            raise RecordError(f"{path} has {about.st_size:,} bytes, more than the {largest:,} that are read.")
        return file.read()
