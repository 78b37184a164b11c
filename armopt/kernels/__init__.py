"""One file per way to call a backend. :mod:`armopt.kernels.table` lists them all; twins run the two operations."""

from armopt.kernels import recurrence as recurrence
from armopt.kernels import twins as twins
