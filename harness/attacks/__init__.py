"""Attacks that the lab plays against itself from outside; each names the check that must stop it."""
