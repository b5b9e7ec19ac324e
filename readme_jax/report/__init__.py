"""A run's report: one self-contained HTML file."""

from readme_jax.report.page import write_report

__all__ = ["write_report"]
