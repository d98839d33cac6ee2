"""Seconds and memory of the loss head against its peers: `python -m bench`, `python -m bench --help`."""
