"""The claims of arXiv 2302.02502 as hypotheses with effects, intervals and verdicts on the user's own study."""
