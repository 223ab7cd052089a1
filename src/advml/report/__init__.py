"""The study as others read it: one table, one page."""
