"""Test the claims of arXiv 2302.02502 on the user's own study: effects, intervals and verdicts."""
