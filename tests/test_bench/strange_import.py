"""A module that cannot be imported, for `--peers tests.test_bench.strange_import:PEER`."""

raise RuntimeError("not today")
