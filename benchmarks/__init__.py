"""One runnable file per question; `python -m benchmarks.NAME --help` says which."""
