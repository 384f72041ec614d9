"""Tests of the harness: unit, concurrency and e2e; see CONTRIBUTING.md."""
