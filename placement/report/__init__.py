"""Pages for people: why a plan is as it is, and what a run, simulated or live, was like."""

from placement.report.plan_report import report_html, write_report

__all__ = ["report_html", "write_report"]
