"""Measuring backends against each other, and remembering what was measured."""
