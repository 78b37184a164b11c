"""One file per way to call a backend. :mod:`armopt.kernels.table` lists them all."""
