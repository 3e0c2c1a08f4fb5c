"""Benchmarks: vmferry beside QEMU in the same run.  ``make bench``; see ``docs/benchmarks.md``."""
