"""Measurements beside physical limits. Never part of the tests."""
