"""Runs bundles on a server: read -> check host -> bind -> run."""
