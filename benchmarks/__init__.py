"""One runnable file per question; `python -m benchmarks.NAME --help` says which."""

import importlib.util

if importlib.util.find_spec("nanotrain.kernels") is None:  # a folder of its own, which only an installation puts in its place
    raise SystemExit("benchmarks: nanotrain is not installed here: pip install -e . --no-deps --no-build-isolation")
