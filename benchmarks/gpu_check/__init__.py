"""The check of the CUDA kernels on a GPU; `__main__.py` says how it goes."""
