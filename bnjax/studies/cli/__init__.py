"""The command line of the studies: progress, reports, logs, and what notebooks use."""
