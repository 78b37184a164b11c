"""Chooses a kernel for every Linear and convolution, at each bucket. Pure."""
