"""Run stages and trials on this machine, on a running Dask scheduler, or as jobs of a cluster's queue."""
