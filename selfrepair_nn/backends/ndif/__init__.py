"""Running jobs on an NDIF server: the connection, what can go wrong with it, the ledger of jobs, the jobs in flight."""
