"""The bundle: what `optimize` writes and a server reads. See docs/bundle.md."""
