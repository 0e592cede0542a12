"""Public operations of nanotrain, imported as `nanotrain.kernels`. One file, one idea; see each module's docstring."""
