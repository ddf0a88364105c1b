"""Metrics, and the report page."""
