"""Jinja2 templates of the host orchestration."""
