"""Shuffles, row lookups, layers and compiler options that make stacked runs fast. README.md says why."""
