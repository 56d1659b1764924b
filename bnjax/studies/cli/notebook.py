"""What the project's notebooks show of published results, as a notebook shows tables."""

from collections.abc import Sequence
from typing import Any

from bnjax._extras import needs
from bnjax.studies.evidence.results import Results, markdown_table

with needs("notebooks"):
    from IPython import display


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> display.Markdown:
    """Shows a table."""
    return display.Markdown(markdown_table(header, [[str(cell) for cell in row] for row in rows]))


def published(study: str, *ids: str) -> display.Markdown:
    """Shows the published verdicts on some claims of a study, or on all, with what was measured.

    Raises:
      ValueError: if the study has no such claims.
      bnjax.studies.evidence.record.RecordError: if no results of it are published.
    """
    claims = {claim["id"]: claim for claim in Results.published(study).document["claims"]}
    if unknown := sorted(set(ids) - set(claims)):
        raise ValueError(f"ids must be among {', '.join(claims)}, got {', '.join(unknown)}.")
    columns = ("id", "statement", "measured", "verdict")
    return table(columns, [[claims[name][column] for column in columns] for name in ids or claims])
