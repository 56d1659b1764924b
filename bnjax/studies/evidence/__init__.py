"""What a study shows: claims as data, statistics, results and their one reader, the ledger and figures."""
