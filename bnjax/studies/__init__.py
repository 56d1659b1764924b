"""The classic studies of batch norm, each one module of this package with `STUDY`, `CLAIMS`, `networks` and `run`.

What the list and the command line say of a study is read from its file, without importing what it trains with.
Directories in the environment variable BNJAX_STUDIES, separated as those of PATH, are searched for studies too.
"""

import ast
import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_SEEDS = 2**20
"""The largest number of seeds of a run, whose results are held in memory."""
LOGS = ("tensorboard", "wandb")
"""Where a run can be logged."""


def option(
    default: Any, text: str, *, shown: str = "", choices: Sequence[str] = (), group: str = "", **more: Any
) -> Any:
    """Declares a field of `Options` that is an option of the command line too, named as the field.

    Args:
      default: its value where it is not given.
      text: text of `--help`.
      shown: the default in words, where it is not that value.
      choices: the only values that it may have.
      group: heading under which `--help` shows it.
      **more: `metavar`, how `--help` shows its value; `read`, which makes it of a text, where its type does not say
        that; and `is_recorded`, whether it may change what is measured.
    """
    about = {"help": text, "default": shown, "choices": choices, "group": group, "metavar": None, "read": None}
    return dataclasses.field(default=default, metadata={**about, "is_recorded": True, **more})


def default_text(field: dataclasses.Field) -> str:
    """Writes the default of an option in words; nothing where there is none worth saying."""
    return field.metadata["default"] or ("" if field.default in (None, False) else str(field.default))


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of any study; a study's own options are a dataclass made of this one.

    There are `seeds` 0 to seeds − 1. Trainings are saved as `saving`, a `bnjax.studies.engine.saving.Saving`, says; not
    at all by default. With `histograms` weights and gradients are counted on the way in studies that else don't.
    """

    seeds: int = option(8, "number of seeds")
    saving: Any = None
    histograms: bool = False

    def __post_init__(self):
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(f"--seeds must be from 1 to {MOST_SEEDS:,}, got {self.seeds:,}.")

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field]:
        """Returns the fields that are options of the command line, by name."""
        return {field.name: field for field in dataclasses.fields(cls) if "help" in field.metadata}

    def to_json(self) -> dict[str, Any]:
        """Returns the options that change what is measured, without the defaults."""
        values = {f: getattr(self, name) for name, f in self.fields().items() if f.metadata["is_recorded"]}
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field, value in values.items()
            if field.name in ("seeds", "dataset") or value != field.default
        }

    def selected(self, networks: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the networks named by the option `variants`, which have to be among them; all where it names none."""
        names: Sequence[str] = getattr(self, "variants", None) or tuple(networks)
        if unknown := sorted(set(names) - set(networks)):
            raise ValueError(f"--variants must be among {', '.join(networks)}, got {', '.join(unknown)}.")
        return {name: networks[name] for name in names}


@dataclasses.dataclass(frozen=True)
class ImageOptions(Options):
    """Options of a study of an image set of TensorFlow Datasets; one of other sets has a field `dataset` of its own."""

    dataset: str = option("mnist", "image set", choices=("mnist", "fashion_mnist"))
    data_dir: str | None = option(
        None, "where TFDS's prepared sets are", shown="$TFDS_DATA_DIR or TFDS's own", metavar="DIR", is_recorded=False
    )


_MANY: Mapping[str, Any] = {"group": "many devices"}
_HERE: Mapping[str, Any] = {**_MANY, "is_recorded": False}


@dataclasses.dataclass(frozen=True)
class ParallelOptions(Options):
    """Options of a study that trains one network on several devices; the text of each says what it is."""

    devices: int | None = option(
        None, "devices of this process (default all; on CPU, simulated ones)", metavar="N", **_HERE
    )
    parallel: str = option("jit", "how a step is mapped", choices=("jit", "shard_map", "pmap"), **_MANY)
    group_size: int | None = option(
        None, "devices whose batch norms synchronize (default all; 1 for statistics of each device)", **_MANY
    )
    accumulate_steps: int = option(1, "micro-batches in a step", metavar="K", **_MANY)
    coordinator: str | None = option(
        None, "address of process 0, the same for all processes", metavar="HOST:PORT", **_HERE
    )
    processes: int | None = option(None, "number of processes", **_HERE)
    process_id: int | None = option(None, "which of them this is, from 0", metavar="I", read=int, **_HERE)
    distributed: bool = option(
        False, "several processes, which JAX finds in the environment (TPU pod, Slurm, Open MPI)", **_HERE
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """The declaration of a study, `STUDY` in its module.

    The module also has `CLAIMS`; `networks(options)`, or `networks(options, images)` where it takes image sets, by name
    what it trains (each a `bnjax.studies.engine.plan.Variant`), unless it has none that can be compiled; and
    `run(options, report)`, which trains, judges the claims, and returns the results and the figures by file name.

    Attributes:
      name: name on the command line, that of the file.
      summary: one line on what it does.
      source: document that the study comes from.
      options: its own options, a dataclass made of `Options`.
      compiled: the network whose training step `bnjax compile` compiles; empty for none.
      compiled_options: options with which it has the size that it has on an accelerator.
      fast: the options of `bnjax claims --fast`; None where that leaves the study out.
      source_size: size of the source's trainings, where the study's default on a CPU is smaller.
      order: place in lists.
    """

    name: str
    summary: str
    source: str
    options: type[Options] = Options
    compiled: str = ""
    compiled_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fast: Mapping[str, Any] | None = None
    source_size: str = ""
    order: int = 100

    @property
    def fields(self) -> dict[str, dataclasses.Field]:
        """The options of the command line, by name."""
        return self.options.fields()

    @property
    def datasets(self) -> Sequence[str]:
        """The image sets that it takes, its default first; none for generated data."""
        return self.fields["dataset"].metadata["choices"] if "dataset" in self.fields else ()

    @property
    def length(self) -> str:
        """The length of its trainings by default, such as 'epochs: 100'."""
        lengths = (f"{name}: {default_text(self.fields[name])}" for name in ("steps", "epochs") if name in self.fields)
        return next(lengths, "")

    def load(self) -> types.ModuleType:
        """Imports the study's module."""
        return importlib.import_module(f"{__name__}.{self.name}")


def _declared(path: Path) -> Study | None:
    """Returns the `STUDY` of a file, of which only that and its `Options` are run; None for a file without."""
    text = path.read_text(encoding="utf-8")
    if "\nSTUDY = " not in text:
        return None
    names, declaration = {**globals(), "studies": sys.modules[__name__]}, []
    for node in ast.parse(text).body:
        match node:
            case ast.ClassDef(name="Options") | ast.Assign(targets=[ast.Name(id="STUDY")]):
                declaration.append(node)
    try:
        exec(compile(ast.Module(declaration, []), str(path), "exec"), names)
    except NameError as error:
        text = "Options and STUDY are read without the rest of the file: use literals, dataclasses and bnjax.studies."
        raise NameError(f"{path}: {error}. {text}", name=error.name) from None
    return names["STUDY"]


def find_studies() -> dict[str, Study]:
    """Finds all studies, by name, in the order of lists."""
    files = (file for directory in __path__ for file in Path(directory).glob("*.py"))
    declared = (study for file in files if (study := _declared(file)))
    return {study.name: study for study in sorted(declared, key=lambda study: (study.order, study.name))}


__path__ += [directory for directory in os.environ.get("BNJAX_STUDIES", "").split(os.pathsep) if directory]
STUDIES = find_studies()
COMPILABLE = (*(study.name for study in STUDIES.values() if study.compiled), "resnet18", "resnet50")
"""The training steps that can be compiled ahead of time."""
