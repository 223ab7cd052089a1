"""`reports/report.html`."""
