"""Builders, fakes and checkers that several tests share."""
