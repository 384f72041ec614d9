"""Races, cancellation and overload, driven by a manual clock and pause points."""
