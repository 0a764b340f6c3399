"""Measurements that people run by hand: each script prints a table and, as its last line, one JSON document."""
