"""Shared by the tests: generated inputs, comparisons that say what differs, tolerances."""
