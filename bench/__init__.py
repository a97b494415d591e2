"""Measurements, and the tables made from them."""
