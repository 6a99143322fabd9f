"""How fast ilajax is, and beside what: `python -m benchmarks`, run from the repository's root."""

from pathlib import Path

# Files of figures that the documentation quotes.
RESULTS = Path("benchmarks/results")
