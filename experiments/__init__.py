"""The paper's experiments, each run by `python -m experiments.<name>` from the repository's root."""
