"""Pages for people: why a plan is as it is, and what a run, simulated or live, was like."""

from placement.report.plan_report import report_html, write_report
from placement.report.run_report import RunDescription, simulation_report_html, write_simulation_report

__all__ = ["RunDescription", "report_html", "simulation_report_html", "write_report", "write_simulation_report"]
