"""Evidence of the studies: claims as data, statistics, results and their one reader, the ledger and figures."""

from bnjax.studies.evidence.claims import read_claims
from bnjax.studies.evidence.results import Results
from bnjax.studies.evidence.statistics import from_then_on, interval, log10_largest_rate, seeds_in_words

__all__ = ["Results", "from_then_on", "interval", "log10_largest_rate", "read_claims", "seeds_in_words"]
