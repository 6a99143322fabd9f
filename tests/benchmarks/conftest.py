"""Compiled programs are kept."""

from compilations import keep_compiled_programs

__all__ = ["keep_compiled_programs"]
